"""Pre-train the bundled `alphabet_vit` on the background alphabets of Omniglot, from scratch.

    python benchmarks/pretrain_backbone.py --source omniglot.parquet --out loda/bundled

Only rows with ``subset == "background"`` are read (964 classes in 30 alphabets), so no class, alphabet or
image of the bundled stream is seen. Drawers 1-15 train; drawers 16-20 of the same classes are held out and give the
pre-training accuracy. The evaluation alphabets are read after training, once, for the model card's figures.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from loda.vision import timm

PIXEL_MEAN, PIXEL_STD = 0.9, 0.25  # of white paper with thin black strokes, rounded


def read_subset(source: Path, subset: str, image_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images uint8 (N, S, S), labels int64 (N,) contiguous from 0, and a bool (N,) that is True for training rows."""
    columns = ["image", "label", "split", "subset"]
    rows = pq.read_table(source, columns=columns, filters=[("subset", "=", subset)]).to_pylist()
    images = np.stack([_decode(row["image"]["bytes"], image_size) for row in rows])
    _, labels = np.unique([row["label"] for row in rows], return_inverse=True)
    train = torch.tensor([row["split"] == "train" for row in rows])
    return torch.from_numpy(images), torch.from_numpy(labels), train


def _decode(encoded: bytes, image_size: int) -> np.ndarray:
    # one-bit PNGs have to become grey before resizing, or Pillow would not average the strokes
    grey = Image.open(io.BytesIO(encoded)).convert("L")
    return np.asarray(grey.resize((image_size, image_size), Image.Resampling.BICUBIC))


def pixels(images_BHW: torch.Tensor) -> torch.Tensor:
    """Normalised float32 (B, 3, H, W) with three equal channels, as the package feeds any backbone."""
    x = (images_BHW.float().div(255) - PIXEL_MEAN) / PIXEL_STD
    return x[:, None].expand(-1, 3, -1, -1)


def random_affine(x: torch.Tensor, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """One random rotation, scale, shear and shift an image; the border repeats (paper stays paper)."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    angle = uniform(-15, 15) * strength * math.pi / 180
    scale_x, scale_y = 1 + uniform(-0.2, 0.2) * strength, 1 + uniform(-0.2, 0.2) * strength
    shear = uniform(-0.2, 0.2) * strength
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale_x * angle.cos(), shear - angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin(), scale_y * angle.cos()
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-0.15, 0.15) * strength, uniform(-0.15, 0.15) * strength
    grid = F.affine_grid(theta, [len(x), 1, *x.shape[-2:]], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def extract(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    features = torch.cat([model(pixels(chunk)) for chunk in images.split(512)])
    model.train()
    return features


def class_mean_accuracy(features: torch.Tensor, labels: torch.Tensor, train: torch.Tensor) -> float:
    """Nearest class mean by cosine, in %: means from the training rows, accuracy on the others."""
    z = F.normalize(features, dim=1)
    classes = int(labels.max()) + 1
    means = torch.zeros(classes, z.shape[1]).index_add_(0, labels[train], z[train])
    return 100 * (z[~train] @ F.normalize(means, dim=1).T).argmax(1).eq(labels[~train]).float().mean().item()


def pretrain(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels, train = read_subset(args.source, "background", args.image_size)
    kwargs = {
        "img_size": args.image_size, "patch_size": args.patch_size, "in_chans": 3, "embed_dim": args.width,
        "depth": args.depth, "num_heads": args.heads, "num_classes": 0, "global_pool": "token", "class_token": True,
    }  # fmt: skip
    model = timm.models.VisionTransformer(**kwargs)
    prototypes = nn.Parameter(torch.randn(int(labels.max()) + 1, args.width) * 0.02)
    optimizer = torch.optim.AdamW([*model.parameters(), prototypes], lr=args.lr, weight_decay=args.weight_decay)
    rows = torch.nonzero(train).flatten()
    total = args.epochs * (len(rows) // args.batch_size)
    warmup = max(1, total // 20)
    step, start = 0, time.time()
    for epoch in range(args.epochs):
        running = 0.0
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        for index in shuffled[: len(rows) // args.batch_size * args.batch_size].split(args.batch_size):
            share = min(1.0, (step + 1) / warmup)
            decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * share * decay
            x = random_affine(pixels(images[index])[:, :1], generator, args.augmentation).expand(-1, 3, -1, -1)
            cosine = F.normalize(model(x), dim=1) @ F.normalize(prototypes, dim=1).T
            loss = F.cross_entropy(args.scale * cosine, labels[index], label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running += loss.item()
            step += 1
        held_out = class_mean_accuracy(extract(model, images), labels, train) if epoch % 5 == 4 else float("nan")
        seconds = time.time() - start
        mean_loss = running * args.batch_size / len(rows)
        progress = f"epoch {epoch + 1}/{args.epochs} loss {mean_loss:.3f} held-out {held_out:.1f} {seconds:.0f} s"
        print(progress, flush=True)
        if args.checkpoint_every and (epoch + 1) % args.checkpoint_every == 0:
            save(model, kwargs, args.out / f"{args.name}_epoch{epoch + 1}", {"epoch": epoch + 1})
    figures = {"held_out_ncm": class_mean_accuracy(extract(model, images), labels, train), "seconds": seconds}
    evaluation, evaluation_labels, evaluation_train = read_subset(args.source, "evaluation", args.image_size)
    features = extract(model, evaluation)
    figures["evaluation_659_way_ncm"] = class_mean_accuracy(features, evaluation_labels, evaluation_train)
    print(json.dumps(figures))
    save(model, kwargs, args.out / args.name, {"epochs": args.epochs, "seed": args.seed, **figures})


def save(model: nn.Module, kwargs: dict[str, object], stem: Path, meta: dict[str, object]) -> None:
    """`STEM.safetensors` (float16) and `STEM.json` (how to build and feed the model)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, stem.with_suffix(".safetensors"))
    card: dict[str, object] = {"class": "VisionTransformer", "architecture": kwargs}
    card |= {"mean": [PIXEL_MEAN] * 3, "std": [PIXEL_STD] * 3, "pretraining": meta}
    stem.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="omniglot.parquet")
    parser.add_argument("--out", type=Path, default=Path("loda/bundled"))
    parser.add_argument("--name", default="alphabet_vit")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--scale", type=float, default=20.0, help="of the cosine logits, as in the stream's heads")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--augmentation", type=float, default=1.0, help="strength of the random affine maps, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=0, help="epochs; 0 keeps only the last")
    return parser.parse_args()


if __name__ == "__main__":
    pretrain(parse())
