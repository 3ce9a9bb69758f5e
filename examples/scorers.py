"""What does a classifier look at? Shapley maps of images by two designs, and the gradient norm of each. Copy, and put your model in.

python examples/scorers.py             the demo's drawn images and a small net that is taught here: seconds, no data, no network
python examples/scorers.py DIR         the images in DIR and torchvision's ResNet-18 (it downloads its weights)
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from infoutil_fast import KernelShap, grad_norms, open_source, patch_shapley


def own(folder):
    """Your part: a model in eval mode, images [N, 3, H, W] normalised as it wants them, classes [N] int64, and their names."""
    from torchvision.models import ResNet18_Weights, resnet18

    weights = ResNet18_Weights.DEFAULT
    model, prepare = resnet18(weights=weights).eval(), weights.transforms()
    files = sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    images = torch.stack([prepare(Image.open(f).convert("RGB")) for f in files])
    with torch.no_grad():
        classes = model(images).argmax(1)  # no labels: explain what it says
    return model, images, classes, weights.meta["categories"]


def demo(epochs):
    source = open_source("demo")
    train, images = (
        (s.batch(range(n), 64) / 127.5 - 1, torch.from_numpy(s.labels[:n])) for s, n in ((source.train, 2000), (source.val, 8))
    )
    layers = [nn.AvgPool2d(2)]
    for i, o in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for batch in torch.cat([torch.randperm(2000) for _ in range(epochs)]).split(64):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
        optimiser.step()
    return model.eval(), *images, source.classes


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?")
parser.add_argument("--out", default="scorers.png")
parser.add_argument("--epochs", type=int, default=6, help="of the small net")
args = parser.parse_args()
torch.manual_seed(0)
model, images, classes, names = own(args.folder) if args.folder else demo(args.epochs)

heat = patch_shapley(model, images, classes)  # [N, 4, 4], 64 evaluations of fixed coalitions
rows, columns = (torch.arange(side) * 4 // side for side in images.shape[2:])
patch = rows[:, None] * 4 + columns  # [H, W], the patch of each pixel
sampled = KernelShap(model).attribute(images, target=classes, feature_mask=patch, n_samples=64)[:, 0]  # [N, H, W], 64 drawn coalitions
norms = grad_norms(model, images, classes)  # [N]

figure = Figure(figsize=(1.7 * len(images), 5.8), layout="constrained")
axes = figure.subplots(3, len(images), squeeze=False)
for n, (image, class_number) in enumerate(zip(images, classes, strict=True)):
    axes[0, n].set_title(f"{names[class_number]}\ngradient norm {norms[n]:.2g}", fontsize=9)
    most = float(max(heat[n].abs().max(), sampled[n].abs().max()))  # one scale for both maps of an image
    pixels = ((image - image.min()) / (image.max() - image.min())).permute(1, 2, 0)
    for axis, values in zip(axes[:, n], (None, heat[n], sampled[n]), strict=True):
        axis.imshow(pixels.numpy(), extent=(0, 4, 4, 0))
        if values is not None:
            axis.imshow(values.numpy(), cmap="bwr", vmin=-most, vmax=most, alpha=0.6, extent=(0, 4, 4, 0))
        axis.set(xticks=[], yticks=[])
for axis, label in zip(axes[:, 0], ("image", "patch_shapley", "KernelShap"), strict=True):
    axis.set_ylabel(label)
figure.savefig(args.out, dpi=110)
print(f"{len(images)} images, red for the class and blue against it: {args.out}")
