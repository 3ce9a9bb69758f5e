"""Shapley maps and gradient norms of a timm model: its own transform, batches of PIL images. Copy, and put your images in.

python examples/timm_scores.py vit_tiny_patch16_224 a.jpg b.jpg     downloads the model's weights
"""

import argparse

import timm
import torch
from PIL import Image

from infoutil_fast import grad_norms, patch_shapley


def scores(name, images, targets=None, pretrained=True):
    """Maps [N, 4, 4], norms [N] and the classes scored [N] of PIL images; without `targets` the classes that the model sees."""
    model = timm.create_model(name, pretrained=pretrained).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = torch.stack([prepare(image.convert("RGB")) for image in images])
    if targets is None:
        with torch.inference_mode():
            targets = model(x).argmax(1)
    # the masks of a transformer follow its tokens by themselves: 4 x 4 patches of 14 x 14 tokens differ in size
    return patch_shapley(model, x, targets), grad_norms(model, x, targets), targets


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    args = parser.parse_args()
    heat, norms, classes = scores(args.model, [Image.open(file) for file in args.images])
    for file, own, norm, number in zip(args.images, heat, norms, classes, strict=True):
        row, column = divmod(int(own.argmax()), own.shape[1])
        print(f"{file}: class {number}, gradient norm {norm:.3g}, most informative patch in row {row}, column {column}")
