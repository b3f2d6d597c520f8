"""Measure what a frozen encoder knows: `python probe.py --checkpoint runs/NAME/last.pt`.

An encoder is evaluated on its last level alone (D of its 4D channels), as the study does.
"""
import argparse
import pickle
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from model import SIZES, Encoder
from synthetic import Blobs, Shapes

HELD_OUT = 1_000_003  # seeds of the probes' clips: far from those of any training run


def load_checkpoint(path):
    """The dict that train.py saved. Raises ValueError or FileNotFoundError, in one sentence, for anything else."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path}; train.py writes one as last.pt in its run folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a checkpoint, or was cut short ({str(error).splitlines()[0]})") from None
    if not isinstance(checkpoint, dict) or not {"config", "evaluated", "encoder", "target"} <= checkpoint.keys():
        raise ValueError(f"{path} was not written by this project's train.py")
    return checkpoint


def make_encoder(config, state=None):
    """The encoder of a saved config: with these weights, or as it was before the run's first step."""
    torch.manual_seed(config["seed"])
    encoder = Encoder(SIZES[config["size"]], config["patch"], config["tubelet"])
    if state is not None:
        encoder.load_state_dict(state)
    return encoder.eval()


@torch.no_grad()
def last_level(encoder, clips):
    """uint8 clips [B, 3, T, H, W] -> tokens of the last level [B, N, D], float32."""
    device = encoder.video.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        features = encoder(data.normalise(clips.to(device)))  # (B, N, 4D)
    return features[..., -encoder.video.shape[-1]:].float()


class LinearHead(nn.Module):
    """One linear layer on mean-pooled tokens [n, D], each channel first brought to mean 0 and deviation 1.

    The training clips' own mean and deviation: frozen features differ in scale by orders of magnitude, and an
    untrained encoder's are small, so that without this a probe would measure scale.
    """

    def __init__(self, pooled, classes):
        super().__init__()
        self.register_buffer("mean", pooled.mean(0))
        self.register_buffer("deviation", pooled.std(0) + 1e-6)
        self.linear = nn.Linear(pooled.shape[-1], classes)

    def forward(self, pooled):
        return self.linear((pooled - self.mean) / self.deviation)  # (n, classes)


class AttentiveHead(nn.Module):
    """Class token and all tokens [n, N, D], one 8-head self-attention with residual, LayerNorm, linear.

    Only the class token is read, so only its query is computed.
    """

    def __init__(self, width, classes):
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens):
        query = self.token.expand(len(tokens), -1, -1)  # (n, 1, D)
        everything = torch.cat((query, tokens), dim=1)  # (n, 1 + N, D)
        attended, _ = self.attention(query, everything, everything, need_weights=False)
        return self.linear(self.norm(query + attended).squeeze(1))  # (n, classes)


def train_head(head, features, labels, lr, epochs, batch, seed, progress=""):
    """AdamW, weight decay 0.01, shuffled epochs; features [n, ...] and labels [n] on the head's device."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), desc=progress, disable=not progress, leave=False):
        for picked in torch.randperm(len(labels), generator=shuffle).split(batch):
            picked = picked.to(labels.device)
            loss = F.cross_entropy(head(features[picked]), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


@torch.no_grad()
def top1(head, features, labels):
    """Accuracy in percent."""
    predicted = torch.cat([head(part).argmax(-1) for part in features.split(256)])
    return 100 * (predicted == labels).float().mean().item()


def linear_accuracy(train, test, seed=0):
    """Linear probe on mean-pooled tokens; train and test are (tokens [n, N, D] or pooled [n, D], labels [n])."""
    (x, y), (x_test, y_test) = [(x.mean(1) if x.ndim == 3 else x, y) for x, y in (train, test)]
    torch.manual_seed(seed)
    head = LinearHead(x, int(y.max()) + 1).to(x.device)
    return top1(train_head(head, x, y, 3e-3, 40, 256, seed), x_test, y_test)


def attentive_accuracy(train, test, lr, epochs, batch, seed=0, progress=""):
    """The study's attentive probe; train and test are (tokens [n, N, D], labels [n])."""
    torch.manual_seed(seed)
    head = AttentiveHead(train[0].shape[-1], int(train[1].max()) + 1).to(train[0].device)
    return top1(train_head(head, *train, lr, epochs, batch, seed, progress), *test)


def synthetic_features(encoder, frames, crop, count, seed, pool):
    """Tokens [count, N, D] (or their mean [count, D]) of held-out moving-shape clips, and their factors."""
    source = Shapes(frames, crop, seed)
    parts = []
    for items in torch.arange(count).split(64):
        tokens = last_level(encoder, source.clips(items))
        parts.append(tokens.mean(1) if pool else tokens)
    features = torch.cat(parts)
    return features, {name: labels.to(features.device) for name, labels in source.factors(torch.arange(count)).items()}


def synthetic_accuracy(encoder, frames, crop, count=3072, attentive=False, seed=0, progress=""):
    """Top-1 % of a probe for each factor of the moving-shape clips: `count` for training, a third as many for test."""
    train, train_factors = synthetic_features(encoder, frames, crop, count, HELD_OUT, pool=not attentive)
    test, test_factors = synthetic_features(encoder, frames, crop, max(1, count // 3), HELD_OUT + 1, pool=not attentive)
    accuracy = {}
    for name in train_factors:
        pair = (train, train_factors[name]), (test, test_factors[name])
        accuracy[name] = (attentive_accuracy(*pair, 1e-3, 10, 64, seed, progress=f"{progress}, {name}")
                          if attentive else linear_accuracy(*pair, seed))
    return accuracy


def blob_accuracy(encoder, frames, crop, seed=0, train_clips=160, test_clips=40, progress=""):
    """The study's synthetic motion benchmark (METHOD.md section 8): 8 directions, attentive probe, 160 / 40 clips."""
    sets = []
    for clips, offset in ((train_clips, 0), (test_clips, train_clips)):
        source = data.BlobVideos(frames, crop, 1, 0, HELD_OUT)
        items = range(offset, offset + clips)
        tokens = [last_level(encoder, source.evaluation_clip(item).unsqueeze(0)) for item in items]
        sets.append((torch.cat(tokens), torch.tensor([source.label(item) for item in items], device=tokens[0].device)))
    return attentive_accuracy(*sets, lr=3e-4, epochs=100, batch=32, seed=seed, progress=progress)


def report(config, encoder, clips, seed):
    """Print every synthetic probe of one encoder; returns the same as a dict of top-1 %."""
    frames, crop = config["frames"], config["crop"]
    results = {}
    for kind, attentive in (("linear", False), ("attentive", True)):
        accuracy = synthetic_accuracy(encoder, frames, crop, clips, attentive, seed, progress=kind)
        results[kind] = accuracy
        print(f"{kind:<10}" + "".join(f"  {name} {value:5.1f}" for name, value in accuracy.items()), flush=True)
    results["blobs"] = blob_accuracy(encoder, frames, crop, seed, progress="blobs")
    print(f"{'blobs':<10}  direction {results['blobs']:5.1f}   (160 / 40 clips: one clip is 2.5 points)")
    return results


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="last.pt of a run folder")
    parser.add_argument("--untrained", action="store_true", help="the same architecture with the weights it began with")
    parser.add_argument("--clips", type=int, default=3072, help="labelled clips to train a probe on; a third as many test it")
    parser.add_argument("--seed", type=int, default=0, help="of the heads and their shuffling")
    flags = parser.parse_args(arguments)
    try:
        checkpoint = load_checkpoint(flags.checkpoint)
        config = checkpoint["config"]
        encoder = make_encoder(config, None if flags.untrained else checkpoint[checkpoint["evaluated"]])
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        what = "untrained encoder" if flags.untrained else f"{checkpoint['evaluated']} encoder at step {checkpoint['step']}"
        print(f"{config['objective']}{' as released' if config['as_released'] else ''}, {what}; top-1 %, chance: "
              "direction 12.5, speed 25, appearance 12.5")
        report(config, encoder.to(device), flags.clips, flags.seed)
    except (ValueError, OSError) as error:
        print(f"probe.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
