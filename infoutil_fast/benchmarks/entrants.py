"""Every entrant of our comparisons, by the name that its rows have: a method, and the options that make it this entrant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entrant:
    """A method under some options; `preset` may be among them."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    colour: str = "grey"  # of its line in a chart, a name in `plots.LINES`
    matching: bool = False  # by trajectory matching: it learns from experts, and makes its students' step size

    def asked(self, **options: Any) -> dict[str, Any]:
        """Arguments of `distill`; the entrant's own options go before `options`."""
        return {**options, "method": self.method, **self.options}


ENTRANTS = {
    "infoutil": Entrant("infoutil", colour="blue"),
    "rded": Entrant("rded", colour="green"),
    "random": Entrant("random"),
    "random images": Entrant("random", {"windows": "whole", "factor": 1}),
    "random crops": Entrant("random", {"windows": "random"}),
    "tesla exact": Entrant("tesla", {"mode": "exact"}, "vermilion", matching=True),
    "tesla first-order": Entrant("tesla", {"mode": "first_order"}, "purple", matching=True),
    "mtt": Entrant("mtt", colour="orange", matching=True),
    # as the paper states it, and without each of its parts
    "infoutil paper": Entrant("infoutil", {"preset": "paper"}),
    "paper, no shapley": Entrant("infoutil", {"preset": "paper", "windows": "random"}),
    "paper, no norm": Entrant("infoutil", {"preset": "paper", "score": "random"}),
    "paper, no noise": Entrant("infoutil", {"preset": "paper", "noise": 0.0}),
    "paper, low": Entrant("infoutil", {"preset": "paper", "direction": "low"}),
    "paper, medium": Entrant("infoutil", {"preset": "paper", "direction": "medium"}),
    "paper, whole images": Entrant("infoutil", {"preset": "paper", "window": 4}),
    # sides of a window in patches of a grid of four, and which scores are kept
    "whole images, low": Entrant("infoutil", {"window": 4, "direction": "low"}),
    "whole images, high": Entrant("infoutil", {"window": 4, "direction": "high"}),
    "three quarters, low": Entrant("infoutil", {"window": 3, "direction": "low"}),
    "half, low": Entrant("infoutil", {"window": 2, "direction": "low"}),
    "half, high": Entrant("infoutil", {"window": 2, "direction": "high"}),
}
FREE = ("infoutil", "rded", "random")  # of training, in `infoutil bench methods`
MATCHING = tuple(name for name, entrant in ENTRANTS.items() if entrant.matching)
DEMO = ("infoutil", "rded", "random crops", "random images")
PAPER = tuple(name for name, entrant in ENTRANTS.items() if entrant.options.get("preset") == "paper")
CHOICES = ("random images", *(name for name, entrant in ENTRANTS.items() if "window" in entrant.options and name not in PAPER))
