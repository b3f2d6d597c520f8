"""probe.py: heads and few-label draws against naive ones; features that survive a kill."""

import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import probe
import synthetic
import train
from model import SIZES, Encoder, load_vjepa, normalise
from probe import BENCHMARKS, Labelled, Recipe
from data import write_dataset
from synthetic import Shapes

CONFIG = {"seed": 0, "model": "tiny", "patch": 8, "tubelet": 2, "frames": 4, "crop": 16}
QUICK = ["--frames", "4", "--crop", "16", "--patch", "8", "--batch", "4"]
LOADERLESS = ["--workers", "0", "--probe-epochs", "1"]


class Clips(data.Clips):
    """A source that needs no decoding: noise, brighter from class to class. Some clips are
    broken, one kills."""

    def __init__(self, items, broken=(), kills=None, classes=8, folder="clips", frames=4):
        self.items, self.labels = [*items], [item % classes for item in items]
        self.broken, self.kills, self.frames, self.crop, self.read = broken, kills, frames, 16, []
        self.paths = [f"{folder}/{item}.mp4" for item in items]

    def __len__(self):
        return len(self.labels)

    def evaluation_clip(self, place):
        item = self.items[place]
        self.read.append(item)
        if item in self.broken:
            raise data.Unreadable(self.paths[place], "it is broken")
        if item == self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = torch.randint(
            32, (3, 4, 16, 16), generator=torch.Generator().manual_seed(item), dtype=torch.uint8
        )
        return noise[:, : self.frames, : self.crop, : self.crop] + 32 * self.labels[place]


def make_checkpoint(folder, *flags, seed=0):
    """last.pt as train.py writes it, with random weights: the target's are others than the
    encoder's."""
    config, _ = train.parse([*QUICK, f"--seed={seed}", *flags, f"--out={folder}"])
    trainer = train.Trainer(config, torch.device("cpu"))
    trainer.model.target = probe.make_encoder({**vars(config), "seed": seed + 100})
    folder.mkdir(parents=True, exist_ok=True)
    trainer.save(7)
    return str(folder / "last.pt")


def make_frozen(folder, **changes):
    config = {**CONFIG, **changes}
    return probe.Frozen(probe.make_encoder(config), config, "", folder)


@pytest.fixture
def quick_blobs(monkeypatch):
    """The blobs benchmark with 40 and 16 `Clips` in the place of blobs: a list of those that were
    opened, and their options."""
    opened, options = [], {}

    def blobs(frames, crop, items, first, directions):
        opened.append(Clips(items, folder=f"blobs{first}", **options))
        return opened[-1]

    monkeypatch.setattr(data, "BlobClips", blobs)
    monkeypatch.setattr(probe, "BLOB_CLIPS", (range(40), range(40, 56)))
    return opened, options


def result(folder, name="blobs"):
    return json.loads((folder / f"results-{name}.json").read_text())


def stored(folder, count, name="x", kind=np.float16):
    """All features [count, N, 128] of a folder features-NAME, which holds those of one identity."""
    (only,) = (folder / f"features-{name}").iterdir()
    return torch.from_numpy(np.fromfile(only, kind)).view(count, -1, 128)


@torch.no_grad()
def naive_features(encoder, clips, pooled=False):
    """The last of the four levels, clip by clip: [n, N or 1, D]."""
    levels = torch.cat(
        [encoder(normalise(clip.unsqueeze(0))).unflatten(-1, (4, -1)) for clip in clips]
    )
    tokens = levels[..., 3, :]
    return tokens.mean(1, keepdim=True) if pooled else tokens


def readable(source):
    return [
        source.evaluation_clip(place)
        for place, item in enumerate(source.items)
        if item not in source.broken
    ]


# ------------------------------------------------------------------------------------------ recipes


def test_the_benchmarks_are_those_of_the_paper():
    """METHOD.md section 8: head, pooling, learning rate, batch, epochs; then what the project
    chose for itself."""
    assert {name: recipe[:5] for name, recipe in BENCHMARKS.items()} == {
        "diving48": ("attentive", False, 1e-3, 16, 100),
        "ssv2": ("attentive", True, 1e-3, 16, 100),
        "imagenet100": ("linear", True, 1e-3, 256, 50),
        "ucf101": ("attentive", False, 3e-4, 16, 100),
        "blobs": ("attentive", False, 3e-4, 32, 100),
    }
    assert not any(recipe.steps for recipe in BENCHMARKS.values()) and probe.WEIGHT_DECAY == 0.01
    assert probe.FEW == ("attentive", False, 1e-3, 32, 0, 150)


def naive_blob(seed, label):
    """METHOD.md section 8, pixel by pixel, of 8 frames [3, 8, 160, 160]; and what the first
    draws are."""
    draw = np.random.default_rng(seed)
    background = draw.integers(0, 80, 3, dtype=np.uint8).tolist()
    noise = draw.integers(0, 30, (32, 160, 160, 1))[..., 0].tolist()
    colour = draw.integers(120, 256, 3, dtype=np.uint8).tolist()
    r = int(draw.integers(10, 40))
    x0, y0 = int(draw.integers(r, 160 - r)), int(draw.integers(r, 160 - r))
    dx, dy = [(0, -4), (3, -3), (4, 0), (3, 3), (0, 4), (-3, 3), (-4, 0), (-3, -3)][label]
    clip = torch.tensor(background) + torch.tensor(noise[:8]).unsqueeze(-1)  # (8, 160, 160, 3)
    for t in range(8):
        cx, cy = min(max(x0 + dx * t, r), 159 - r), min(max(y0 + dy * t, r), 159 - r)
        for x, y in itertools.product(range(cx - r, cx + r + 1), range(cy - r, cy + r + 1)):
            if (x - cx) ** 2 + (y - cy) ** 2 <= r**2:
                clip[t, y, x] = torch.tensor(colour)
    return clip.permute(3, 0, 1, 2).byte(), (*background, *noise[0][0][:3], *colour, r, x0, y0)


def test_the_blobs_benchmark_is_the_papers_whatever_the_encoder_was_trained_on():
    expected = {i: naive_blob(42 + i, i % 8) for i in (0, 163)}
    assert expected[0][1] == (42, 11, 67, 23, 19, 13, 234, 207, 250, 17, 29, 22)
    for frames, crop in ((16, 224), (4, 32)):
        flags = probe.parse(["--checkpoint", "any", "--benchmark", "blobs"])
        _, *sources = probe.open_sources(flags, frames, crop)
        assert [len(source) for source in sources] == [160, 40]
        assert sources[0].labels + sources[1].labels == [i % 8 for i in range(200)]
        for source, item, i in ((sources[0], 0, 0), (sources[1], 3, 163)):
            clip = expected[i][0]
            assert torch.equal(source.evaluation_clip(item), clip)
            trained_on = data.BlobClips(frames, crop).blobs.video(42 + i)[0]
            assert torch.equal(trained_on[:, 0], clip[:, 0])
            assert not torch.equal(trained_on[:, :8], clip)


# -------------------------------------------------------------------------------------------- heads


def logits(head, tokens):
    """One head alone: tokens [n, N, D] -> [n, classes]."""
    return head.logits({name: each.unsqueeze(0) for name, each in head.named_parameters()}, tokens)[
        0
    ]


def naive_attentive_logits(head, tokens):
    """One clip [N, D], float64: self-attention of class token and tokens, a head and a query at a
    time."""
    x = torch.cat((head.token[None], tokens))  # (1 + N, D)
    size, biases = x.shape[1] // 8, head.biases.flatten(1)
    q = x @ head.query.flatten(0, 1).T + biases[0]
    k = x @ head.key.flatten(0, 1).T
    v = x @ head.value.flatten(0, 1).T + biases[1]
    attended = torch.zeros_like(x)
    for h, i in itertools.product(range(8), range(len(x))):
        part = slice(h * size, (h + 1) * size)
        scores = [torch.dot(q[i, part], k[j, part]) / math.sqrt(size) for j in range(len(x))]
        shares = torch.stack(scores).exp() / sum(score.exp() for score in scores)
        for j in range(len(x)):
            attended[i, part] += shares[j] * v[j, part]
    read = (x + head.out(attended))[0]
    read = (read - read.mean()) / torch.sqrt(((read - read.mean()) ** 2).mean() + 1e-5)
    return (read * head.norm.weight + head.norm.bias) @ head.linear.weight.T + head.linear.bias


@pytest.fixture
def random_head():
    torch.manual_seed(0)
    head = probe.AttentiveHead(16, 5).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head, torch.randn(3, 4, 16, dtype=torch.float64, requires_grad=True)


@torch.no_grad()
def test_the_attentive_head_equals_full_self_attention_read_at_the_class_token(random_head):
    head, tokens = random_head
    expected = torch.stack([naive_attentive_logits(head, clip) for clip in tokens])
    torch.testing.assert_close(logits(head, tokens), expected, rtol=1e-10, atol=1e-10)
    # Pooled clips are clips of one token.
    one = naive_attentive_logits(head, tokens[2, :1])
    torch.testing.assert_close(logits(head, tokens[:, :1])[2], one, rtol=1e-10, atol=1e-10)


def test_the_attentive_head_has_the_values_and_gradients_of_torchs_attention(random_head):
    head, tokens = random_head
    attention = torch.nn.MultiheadAttention(16, 8, batch_first=True).double()
    theirs = {
        "in_proj_weight": torch.cat((head.query, head.key, head.value)).flatten(0, 1),
        "in_proj_bias": torch.stack((head.biases[0], torch.randn(8, 2).double(), head.biases[1])).flatten(),
        "out_proj.weight": head.out.weight,
        "out_proj.bias": head.out.bias,
    }
    x = torch.cat((head.token.expand(3, 1, -1), tokens), dim=1)
    attended, _ = torch.func.functional_call(attention, theirs, (x[:, :1], x, x))
    reference = head.linear(head.norm(x[:, 0] + attended[:, 0]))
    assert (logits(head, tokens) - reference).norm() <= 1e-10 * reference.norm()
    inputs = {"tokens": tokens, **dict(head.named_parameters())}
    weights = torch.randn(3, 5, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((out * weights).sum(), [*inputs.values()], retain_graph=True)
        for out in (logits(head, tokens), reference)
    ]
    for name, found, expected in zip(inputs, *gradients):
        assert expected.norm() > 0, name
        assert (found - expected).norm() <= 1e-10 * expected.norm(), name


@pytest.mark.parametrize("kind", [probe.LinearHead, probe.AttentiveHead])
@torch.no_grad()
def test_heads_side_by_side_compute_what_each_computes_alone(kind):
    """Five heads on the same clips, and each on its own."""
    torch.manual_seed(0)
    heads = [kind(16, 3) for _ in range(5)]
    weights, _ = torch.func.stack_module_state(heads)
    for tokens in (torch.randn(2, 4, 16), torch.randn(5, 2, 4, 16)):
        found = heads[0].logits(weights, tokens)
        alone = [
            logits(head, tokens if tokens.dim() == 3 else tokens[i]) for i, head in enumerate(heads)
        ]
        torch.testing.assert_close(found, torch.stack(alone))


def make_set(count, width=16, tokens=3, spread=0.0, seed=0):
    """Clips of four classes; `spread` parts them along an axis for each class, 0 leaves noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    features = torch.randn(count, tokens, width, generator=generator)
    features[torch.arange(count), :, labels] += spread
    return Labelled(features, labels)


@pytest.mark.parametrize("head", ["attentive", "linear", "standardised"])
def test_heads_learn_what_is_separable_and_nothing_from_noise(head):
    recipe = Recipe(head, head == "standardised", 1e-2, 64, 8)
    chance = 25 - 4 * 1.94, 25 + 4 * 1.94  # within four deviations of 500 answers
    for spread, (low, high) in ((8.0, (99, 100)), (0.0, chance)):
        train_set, test = (
            make_set(count, spread=spread, seed=seed) for count, seed in ((300, 0), (500, 1))
        )
        train_set, test = (train_set.pool(), test.pool()) if recipe.pooled else (train_set, test)
        (found,) = probe.accuracies(recipe, train_set, test, [0], "cpu")
        assert low <= found <= high, spread


def test_classes_may_have_any_numbers():
    """A head learns the same from classes 0, 1, 2 and from 7, 70, 20230101, a gap or none."""
    tokens = torch.randn(60, 3, 16)
    labels = torch.arange(60) % 3
    tokens[:, :, 0] += labels[:, None]
    names, found = torch.tensor([7, 70, 20230101]), []
    for each in (labels, names[labels]):
        each = each.index_fill(0, torch.tensor([4]), -1)  # one that cannot be read
        split = Labelled(tokens, each)
        recipe = probe.FEW._replace(steps=9)
        found.append(probe.accuracies(recipe, split, split, [0, 1], "cpu", 5))
    assert found[0] == found[1]


def test_only_the_standardised_head_is_blind_to_scale_and_offset():
    train_set, test = make_set(200, spread=4.0).pool(), make_set(200, spread=4.0, seed=1).pool()
    scale, offset = torch.logspace(-3, 1, 16), torch.linspace(
        -5, 5, 16
    )  # what parts the classes becomes tiny
    moved = [Labelled(clips.features * scale + offset, clips.labels) for clips in (train_set, test)]
    found = {
        head: [
            probe.accuracies(Recipe(head, True, 1e-2, 32, 10), *pair, [0], "cpu")[0]
            for pair in ((train_set, test), moved)
        ]
        for head in ("linear", "standardised")
    }
    assert min(found["standardised"]) > 95
    assert found["standardised"][0] == pytest.approx(found["standardised"][1], abs=1)
    assert found["linear"][0] > 95 and found["linear"][1] < 60


def test_heads_are_trained_by_adamw_on_the_mean_cross_entropy():
    """Against the equations in float64: betas 0.9 and 0.999, eps 1e-8, decoupled weight decay
    0.01."""
    clips, rate = make_set(12, tokens=1, spread=1.0), 0.05
    torch.manual_seed(0)
    head = probe.LinearHead(16, 4)
    x, onehot = clips.features[:, 0].double(), torch.eye(4, dtype=torch.float64)[clips.labels]
    weights = [each.detach().double().clone() for each in (head.linear.weight, head.linear.bias)]
    means = [[torch.zeros_like(each) for each in weights] for _ in range(2)]
    for t in range(1, 6):
        error = ((x @ weights[0].T + weights[1]).softmax(-1) - onehot) / 12
        for i, gradient in enumerate((error.T @ x, error.sum(0))):
            means[0][i] = 0.9 * means[0][i] + 0.1 * gradient
            means[1][i] = 0.999 * means[1][i] + 0.001 * gradient**2
            change = means[0][i] / (1 - 0.9**t) / ((means[1][i] / (1 - 0.999**t)).sqrt() + 1e-8)
            weights[i] -= rate * (0.01 * weights[i] + change)
    orders = [[torch.arange(12)] * 5]
    found = probe.train_heads([head], clips, orders, Recipe("linear", True, rate, 12, 5), "cpu")
    for name, expected in zip(("linear.weight", "linear.bias"), weights):
        torch.testing.assert_close(found[name][0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shown, batch, how, sizes",
    [
        ([i for i in range(40) if i % 4], 8, {"epochs": 3}, [8, 8, 8, 6] * 3),
        ([i for i in range(40) if i % 4], 8, {"steps": 11}, [8] * 11),
        ([*range(3, 40)], 32, {"steps": 10}, [32] * 10),
        ([6], 3, {"steps": 4}, [3] * 4),
    ],
)
def test_batches_are_cut_from_one_shuffled_pass_over_the_labelled_clips_after_the_other(
    shown, batch, how, sizes
):
    """Of each pass by itself for epochs; for steps whole batches, which go on from one pass to
    the next."""
    labels, recipe = torch.full((40,), -1), Recipe("linear", True, 1e-3, batch, **how)
    labels[shown] = torch.arange(len(shown)) % 3

    def passes(seed):
        steps = probe.clip_order(labels, recipe, seed)
        assert [len(each) for each in steps] == sizes
        rows = torch.cat(steps).tolist()
        return [tuple(rows[i : i + len(shown)]) for i in range(0, len(rows), len(shown))]

    *first, last = passes(0)
    assert [*first, last] == passes(0) and all(sorted(each) == shown for each in first)
    assert len({*last}) == len(last) and {*last} <= {*shown}
    others = passes(1) + first
    assert len({*others}) == (len(others) if len(shown) > 1 else 1)


def test_few_label_heads_are_each_what_they_are_alone_and_others_share_the_order_of_the_first():
    train_set, test = (make_set(60, spread=1.0, seed=seed) for seed in (0, 1))
    few, every = Recipe("attentive", False, 1e-2, 8, steps=12), Recipe("linear", True, 1e-2, 8, 3)
    alone = [probe.accuracies(few, train_set, test, [seed], "cpu", 3)[0] for seed in range(4)]
    assert len({*alone}) > 1 and probe.accuracies(few, train_set, test, range(4), "cpu", 3) == alone

    train_set, test = train_set.pool(), test.pool()
    heads = []
    for seed in (2, 3):
        torch.manual_seed(seed)
        heads.append(probe.LinearHead(16, 4))
    weights = probe.train_heads(
        heads, train_set, [probe.clip_order(train_set.labels, every, 2)], every, "cpu"
    )
    scores = test.features[:, 0] @ weights["linear.weight"].mT + weights["linear.bias"][:, None]
    right = 100 * (scores.argmax(-1) == test.labels).double().mean(1)
    assert probe.accuracies(every, train_set, test, [2, 3], "cpu") == right.tolist()


# --------------------------------------------------------------------------------------- few labels


def test_k_shot_draws_are_balanced_nested_and_depend_on_labels_and_seed_alone():
    labels = torch.randint(6, (400,), generator=torch.Generator().manual_seed(0))
    labels[:3] = 6  # a class of three clips
    labels[3:][labels[3:] == 6] = 0
    shown = {shots: probe.draw_shots(labels, shots, 5) for shots in (1, 5, 10)}
    for shots, few in shown.items():
        assert (few[few >= 0] == labels[few >= 0]).all()
        assert few[few >= 0].bincount().tolist() == [shots] * 6 + [min(3, shots)]
    assert (shown[5][shown[1] >= 0] >= 0).all() and (shown[10][shown[5] >= 0] >= 0).all()
    assert torch.equal(probe.draw_shots(labels.clone(), 5, 5), shown[5])
    assert not torch.equal(probe.draw_shots(labels, 5, 6), shown[5])


def test_probes_of_moving_shapes_see_the_clips_tokens_and_labels_that_they_name(monkeypatch):
    """Each draw is a head of its seed on the clips of that draw, cut out by hand."""
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=3))
    monkeypatch.setattr(probe, "LINEAR", probe.LINEAR._replace(epochs=1))
    encoder = probe.make_encoder(CONFIG)
    worlds = probe.held_out(encoder, CONFIG)
    found = probe.probe_clips(encoder, worlds, 192, 3, (1, 2, 0))
    assert list(found) == ["clips", "1", "2", "all", "linear"]
    assert found["clips"] == {"learn": 192, "test": 64}
    tokens, labels = [], []
    for seed, count in ((probe.HELD_OUT, 192), (probe.HELD_OUT + 1, 64)):
        source = Shapes(4, 16, seed)
        with torch.no_grad():
            tokens.append(
                torch.cat(
                    [
                        encoder(normalise(source.clips(range(i, i + 64))))[..., -128:].clone()
                        for i in range(0, count, 64)
                    ]
                )
            )
        factors = source.factors(range(count))
        labels.append(
            {
                **factors,
                "motion": torch.tensor(
                    [
                        4 * direction + speed
                        for direction, speed in zip(
                            factors["direction"].tolist(), factors["speed"].tolist()
                        )
                    ]
                ),
            }
        )
    assert {
        factor: int(labels[0][factor].max()) + 1 for factor in labels[0]
    } == synthetic.Shapes.classes
    for k, factor in itertools.product((1, 2, 0), ("direction", "motion", "appearance")):
        values = found[str(k or "all")][factor]
        if k == 0:
            full = (Labelled(each.half(), some[factor]) for each, some in zip(tokens, labels))
            assert values == probe.accuracies(probe.FEW, *full, range(3, 8), "cpu")
            continue
        for draw, value in zip(range(3, 8), values, strict=True):
            shown = probe.draw_shots(labels[0][factor], k, draw) >= 0
            few = (
                Labelled(tokens[0][shown].half(), labels[0][factor][shown]),
                Labelled(tokens[1].half(), labels[1][factor]),
            )
            assert [value] == probe.accuracies(probe.FEW, *few, [draw], "cpu")
    assert list(found["linear"]) == ["direction", "speed", "appearance"]
    for factor, value in found["linear"].items():
        pooled = [Labelled(each.half(), some[factor]).pool() for each, some in zip(tokens, labels)]
        assert [value] == probe.accuracies(probe.LINEAR, *pooled, [3], "cpu")


def test_the_table_of_moving_shapes_holds_means_deviations_and_chance(capsys):
    draws = {
        "direction": [10.0, 20.0, 30.0, 40.0, 50.0],
        "motion": [4.0] * 5,
        "appearance": [1.0, 2.0, 3.0, 4.0, 6.5],
    }
    found = {"clips": {"learn": 600, "test": 200}, "5": draws,
             "linear": {"direction": 61.25, "speed": 26.0, "appearance": 99.0}}
    worlds = probe.held_out(probe.make_encoder(CONFIG), CONFIG)
    probe.show({"trained": found}, worlds, 600)
    title, more, columns, few, linear, chance = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("Top-1 % on 200 generated clips, held out")
    assert more.endswith("linear head: all 600 labels")
    assert columns.split() == ["direction", "speed", "appearance", "motion"]
    # Deviations of five: sqrt(1000 / 4), and of 1 2 3 4 6.5, whose mean is 3.3, sqrt(17.8 / 4).
    assert few.split() == "trained, 5 30.0 ± 15.8 3.3 ± 2.1 4.0 ± 0.0".split()
    assert linear.split() == "trained, linear 61.2 26.0 99.0".split()
    assert chance.split() == "chance 12.5 25.0 12.5 3.1".split()


def test_the_probe_along_a_run_is_of_few_labels_and_leaves_random_numbers_alone(monkeypatch):
    """One head for each factor, of two thirds of the steps, on the clips of draw 0 of the finest
    one, cut out by hand; for
    labelled sources on those that can be read."""
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=3))
    monkeypatch.setattr(probe, "ALONG_TRAIN", 200)
    monkeypatch.setattr(probe, "ALONG_TEST", 24)
    encoder = probe.make_encoder(CONFIG)
    before = torch.get_rng_state()
    found = probe.along(encoder, probe.held_out(encoder, CONFIG))
    assert torch.equal(torch.get_rng_state(), before)
    assert [*found] == ["direction", "motion", "appearance"]
    learn, exam = (Shapes(4, 16, probe.HELD_OUT + i) for i in range(2))
    known, tested = learn.factors(range(probe.ALONG_TRAIN)), exam.factors(range(probe.ALONG_TEST))
    drawn = (probe.draw_shots(known["motion"], 5, 0) >= 0).nonzero().squeeze(1)
    assert 100 <= len(drawn) <= 160
    tokens = [
        naive_features(encoder, source.clips(items)).half()
        for source, items in ((learn, drawn), (exam, range(probe.ALONG_TEST)))
    ]
    for factor, value in found.items():
        sets = [Labelled(tokens[0], known[factor][drawn]), Labelled(tokens[1], tested[factor])]
        assert [value] == probe.accuracies(probe.FEW._replace(steps=2), *sets, [0], "cpu", 5)

    own = Clips(range(60), broken=[3]), Clips(range(100), broken=[0, 8])
    before = torch.get_rng_state()
    found = probe.along(encoder, own)
    assert torch.equal(torch.get_rng_state(), before) and [*found] == ["class"]
    drawn = (probe.draw_shots(torch.tensor(own[0].labels), 5, 0) >= 0).nonzero().squeeze(1)
    assert own[0].read == drawn.tolist() and len(own[1].read) == probe.ALONG_TEST
    sets = []
    for source in own:
        items, labels = [*source.read], torch.tensor(source.labels)[source.read]
        for place, item in enumerate(items):
            if item in source.broken:
                items[place], labels[place] = 1, -1  # any other clip, without a label
        clips = [source.evaluation_clip(item) for item in items]
        sets.append(Labelled(naive_features(encoder, clips).half(), labels))
    assert [found["class"]] == probe.accuracies(probe.FEW._replace(steps=2), *sets, [0], "cpu", 5)


def test_the_table_of_your_own_clips_stands_beside_chance_and_says_where_labels_lack(
    monkeypatch, capsys
):
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=3))
    monkeypatch.setattr(probe, "LINEAR", probe.LINEAR._replace(epochs=1))
    encoder = probe.make_encoder(CONFIG)
    sources = Clips(range(30), broken=[4]), Clips(range(40), broken=[0])
    found = probe.probe_clips(encoder, sources, 60)
    assert found.pop("clips") == {"learn": 29, "test": 19}  # of each, one cannot be read
    assert [*found] == ["5", "linear"] and len(found["5"]["class"]) == 5
    assert sources[0].read == [*range(30)] and len(sources[1].read) == 20
    sets = []
    for source in sources:
        items = [item for item in source.read if item not in source.broken]
        tokens = naive_features(encoder, [source.evaluation_clip(item) for item in items])
        sets.append(Labelled(tokens.half(), torch.tensor([source.labels[i] for i in items])))
    assert probe.accuracies(probe.LINEAR, *sets, [0], "cpu") == [found["linear"]["class"]]

    draws = {"clips": {"learn": 29, "test": 19}, "5": {"class": [10.0, 20.0, 30.0, 40.0, 50.0]},
             "linear": {"class": 61.25}}
    probe.show({"trained": draws}, sources, 60)
    title, more, columns, few, linear, chance = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("Top-1 % on 19 of your clips, held out")
    assert more.endswith("all 29 labels (8 of 8 classes have fewer labels, down to 3)")
    assert columns.split() == ["class"]
    assert few.split() == "trained, 5 30.0 ± 15.8".split()
    assert linear.split() == "trained, linear 61.2".split()
    assert chance.split() == "chance 12.5".split()
    # A class that is only tested counts, as it does for a head.
    sources = [data.Clips("abcd", labels, 2, 8) for labels in ([0, 0, 1, 1], [0, 1, 2, 3])]
    probe.show({"trained": draws}, sources, 4)
    assert capsys.readouterr().out.split()[-2:] == ["chance", "25.0"]


# -------------------------------------------------------------------------------- features in files


@pytest.mark.parametrize("pooled, workers", [(False, 0), (False, 2), (True, 0)])
def test_features_are_the_last_level_of_every_clip_that_can_be_read(
    tmp_path, capsys, pooled, workers
):
    frozen, source = make_frozen(tmp_path), Clips(range(40), broken=[0, *range(16, 32), 39])
    found, about = probe.extract(frozen, source, "x", pooled, workers)
    there = torch.tensor([item for item in range(40) if item not in source.broken])
    features, expected = found.features[there], naive_features(
        frozen.encoder, readable(source), pooled
    )
    assert found.features.shape[1:] == expected.shape[1:] == (1 if pooled else 2 * 2 * 2, 128)
    assert features.dtype == torch.float16
    torch.testing.assert_close(features.float(), expected, rtol=2e-3, atol=2e-3)
    assert found.labels[there].tolist() == [source.labels[item] for item in there]
    assert (found.labels >= 0).sum() == len(there) == 22
    assert "18 of 40 clips of x cannot be read" in capsys.readouterr().out
    assert about["unreadable"] == [source.paths[item] for item in source.broken]
    torch.testing.assert_close(found.pool().features[there], features.float().mean(1, keepdim=True))
    rows, read = torch.tensor([33, 2, 2, 12]), probe.reader(found.features, "cpu")
    for some in (rows, rows[:2], rows):
        assert torch.equal(read(some), found.features[some].float())


def test_a_killed_extraction_goes_on_and_writes_the_same_features_to_the_bit(
    tmp_path, monkeypatch, exit_status
):
    """The source kills its own process when asked for clip 40, in the middle of a chunk."""

    def extract(folder, **options):
        source = Clips(range(60), broken=[3, 20], **options)
        probe.extract(make_frozen(tmp_path / folder), source, "x", False, 0)
        return source.read

    assert exit_status(lambda: extract("killed", kills=40)) == -signal.SIGKILL
    assert extract("killed") == [*range(32, 60)]
    assert extract("whole") == [*range(60)] and extract("whole") == []
    killed, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*.bin")}
        for folder in ("killed", "whole")
    )
    assert killed == whole and len(whole) == 1


def test_features_are_used_again_only_for_the_same_weights_clips_sizes_and_code(
    tmp_path, monkeypatch
):
    def read(frozen=None, pooled=False, folder=tmp_path, **changes):
        """How many of five clips an extraction had to read."""
        source = Clips(range(5), folder=folder)
        vars(source).update(changes)
        found, _ = probe.extract(frozen or make_frozen(tmp_path), source, "x", pooled, 0)
        assert found.labels.tolist() == source.labels
        return len(source.read)

    changed = make_frozen(tmp_path)
    with torch.no_grad():
        changed.encoder.blocks[2].mlp.fc1.bias[5] += 0.5
    assert read() == 5 and read() == 0
    for options in (
        {"frozen": changed},
        {"pooled": True},
        {"folder": tmp_path / "elsewhere"},
        {"labels": [0, 1, 2, 3, 7]},
        {"crop": 8},
        {"frames": 2},
    ):
        assert read(**options) == 5 and read() == 5, options
    torch.testing.assert_close(
        stored(tmp_path, 5).float(),
        naive_features(make_frozen(tmp_path).encoder, readable(Clips(range(5)))),
        rtol=2e-3,
        atol=2e-3,
    )
    for i, content in enumerate(
        (b"a file", b"a larger file", b"ANOTHER FILE.")
    ):  # the last two are equally long
        (tmp_path / "3.mp4").write_bytes(content)
        os.utime(tmp_path / "3.mp4", ns=(0, 1_000_000_000 + i))
        assert read() == 5 and read() == 0
    for name in ("model.py", "data.py", "synthetic.py", "probe.py"):
        shutil.copy(Path(probe.__file__).with_name(name), tmp_path)
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "probe.py"))
    for name in ("model.py", "data.py", "synthetic.py", "probe.py"):
        assert read() == 0
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
        assert read() == 5


@pytest.mark.parametrize(
    "damage, read", [(b"", range(40)), (b"text", range(40)), (b"half", range(16, 40))]
)
def test_damaged_features_are_made_again_and_those_of_others_removed(tmp_path, damage, read):
    frozen, source = make_frozen(tmp_path), Clips(range(40))
    probe.extract(frozen, source, "x", False, 0)
    whole, file = stored(tmp_path, 40), next(tmp_path.rglob("*.bin"))
    shutil.copy(file, file.with_name("0123456789abcdef.bin"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == b"half" else damage)
    found, _ = probe.extract(frozen, source, "x", False, 0)
    assert torch.equal(found.features, whole) and torch.equal(stored(tmp_path, 40), whole)
    assert source.read == [*range(40), *read]


def test_a_second_process_on_the_same_features_is_told(tmp_path, capfd, quick_blobs, exit_status):
    flags = ["--checkpoint", make_checkpoint(tmp_path), "--benchmark", "blobs", *LOADERLESS]
    (tmp_path / "features-blobs-train").mkdir()
    with data.locked(tmp_path / "features-blobs-train"):
        assert exit_status(lambda: sys.exit(probe.main(flags))) == 1
    (message,) = capfd.readouterr().err.splitlines()
    assert message.startswith(
        f"probe.py: another process is at work on {tmp_path}/features-blobs-train;"
    )
    assert probe.main(flags) == 0


# ------------------------------------------------------------------------------------------ results


def test_a_result_says_how_it_came_about_and_keeps_what_was_measured_before(
    tmp_path, monkeypatch, capsys, quick_blobs
):
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=2))
    opened, options = quick_blobs
    options["broken"] = [5, 45]
    flags = ["--checkpoint", make_checkpoint(tmp_path), "--benchmark", "blobs", "--workers", "0"]
    assert probe.main([*flags, "--seeds", "2", "--probe-epochs", "20"]) == 0
    found = result(tmp_path)
    assert found["encoder"] == f"target of {flags[1]}, step 7"
    assert found["sha256"] == probe.encoder_fingerprint(probe.make_encoder({**CONFIG, "seed": 100}))
    assert [found[split]["source"] for split in ("train", "test")] == [
        probe.clips_fingerprint(source) for source in opened
    ]
    assert [found[split]["unreadable"] for split in ("train", "test")] == [
        ["blobs42/5.mp4"],
        ["blobs42/45.mp4"],
    ]
    names = [f"all labels, {head} head" for head in ("attentive", "standardised")]
    assert [*found["measurements"]] == names
    each = found["measurements"]["all labels, attentive head"]
    assert each["how"] == {
        "head": "attentive",
        "pooled": False,
        "lr": 3e-4,
        "batch": 32,
        "epochs": 20,
        "steps": 0,
        "k": 0,
        "seeds": [0, 1],
    }
    assert min(each["values"]) > 60  # classes differ in brightness, and chance is 12.5
    mean, deviation = sum(each["values"]) / 2, abs(
        each["values"][0] - each["values"][1]
    ) / math.sqrt(2)
    output = capsys.readouterr().out
    assert f"top-1 {mean:5.1f} ± {deviation:.1f} over 2\n" in output
    assert (
        "39 clips to learn from, 15 to be tested on," in output
        and "8 classes, chance 12.5\n" in output
    )
    assert probe.main([*flags, "--shots", "1"]) == 0
    few = [f"1 labels, {head} head" for head in ("attentive", "standardised")]
    assert [*result(tmp_path)["measurements"]] == names + few
    options["classes"] = 7  # other clips: what was measured before is not of these
    assert probe.main([*flags, "--shots", "1"]) == 0
    assert [*result(tmp_path)["measurements"]] == few


def test_features_are_written_for_code_of_your_own(tmp_path, quick_blobs, capsys):
    quick_blobs[1]["broken"] = [2, 45]
    flags = ["--checkpoint", make_checkpoint(tmp_path), "--benchmark", "blobs", *LOADERLESS]
    encoder, file = probe.make_encoder({**CONFIG, "seed": 100}), tmp_path / "features.pt"
    for more, pooled in ([], True), (["--tokens"], False):
        assert probe.main([*flags, "--features", str(file), *more]) == 0
        saved = torch.load(file)
        assert saved["encoder"] == f"target of {flags[1]}, step 7"
        assert saved["sha256"] == probe.encoder_fingerprint(encoder)
        for split, source in zip(("train", "test"), quick_blobs[0][-2:]):
            there = [place for place, item in enumerate(source.items) if item not in source.broken]
            assert saved[split]["paths"] == [source.paths[place] for place in there]
            assert saved[split]["labels"].tolist() == [source.labels[place] for place in there]
            expected = naive_features(encoder, readable(source), pooled)
            expected = expected.squeeze(1) if pooled else expected
            torch.testing.assert_close(
                saved[split]["features"].float(), expected, rtol=2e-3, atol=2e-3
            )
    assert not list(tmp_path.glob("results-*"))


def test_the_same_clips_for_training_and_test_and_classes_that_lack_labels_are_told(
    tmp_path, monkeypatch, capsys, quick_blobs
):
    for i in range(6):
        (tmp_path / f"{i}.mp4").write_bytes(b"")
    (tmp_path / "a.csv").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(4)))
    (tmp_path / "b.csv").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(3, 6)))
    lists = [f"--train-list={tmp_path}/a.csv", f"--test-list={tmp_path}/b.csv"]
    probe.open_sources(probe.parse(["--untrained=tiny", *lists]), 4, 16)
    assert "in both lists: 1 of 3 test clips" in capsys.readouterr().out

    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=2))
    flags = ["--checkpoint", make_checkpoint(tmp_path / "run"), "--benchmark=blobs", *LOADERLESS]
    monkeypatch.setattr(probe, "BLOB_CLIPS", (range(12), range(12, 20)))
    assert probe.main([*flags, "--shots=1,2"]) == 0
    output = capsys.readouterr().out
    note = "(4 of 8 classes have fewer labels, down to 1)"
    assert [note in line for line in output.splitlines() if "top-1" in line] == [False] * 2 + [
        True
    ] * 2


def test_results_are_of_the_same_clips_only_if_paths_and_times_are(tmp_path):
    source, found = Clips(range(5), folder=tmp_path), set()
    for i in range(3):
        (tmp_path / "3.mp4").write_bytes(b"")
        os.utime(tmp_path / "3.mp4", ns=(0, 1_000_000_000 + i))
        found.add(probe.clips_fingerprint(source))
    found.add(probe.clips_fingerprint(Clips(range(5), folder=tmp_path / "elsewhere")))
    assert len(found) == 4


def test_few_label_measurements_are_of_both_heads_and_of_the_same_draws_for_every_checkpoint(
    tmp_path, monkeypatch, quick_blobs
):
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=2))
    flags = [*"--benchmark blobs --shots 1,3,all --seeds 2 --seed 4".split(), *LOADERLESS]
    for seed in (0, 1):
        assert (
            probe.main(["--checkpoint", make_checkpoint(tmp_path / str(seed), seed=seed), *flags])
            == 0
        )
    a, b = (result(tmp_path / folder)["measurements"] for folder in ("0", "1"))
    assert (
        list(a)
        == list(b)
        == [
            f"{k} labels, {head} head"
            for k in (1, 3, "all")
            for head in ("attentive", "standardised")
        ]
    )
    assert [a[name]["how"] for name in a] == [b[name]["how"] for name in b]
    assert [a[name]["values"] for name in a] != [b[name]["values"] for name in b]
    assert [len(each["values"]) for each in a.values()] == [5, 5, 5, 5, 2, 2]
    few, every = (
        [
            a[f"{k} labels, standardised head"]["how"][key]
            for key in ("k", "seeds", "steps", "epochs")
        ]
        for k in (3, "all")
    )
    assert few == [3, [4, 5, 6, 7, 8], 2, 0] and every == [0, [4, 5], 0, 1]


@pytest.mark.parametrize("damage", [b"{", b"\xff", b""])
def test_a_damaged_result_is_named_before_any_clip_is_read_and_kept(
    tmp_path, capsys, quick_blobs, damage
):
    flags = ["--checkpoint", make_checkpoint(tmp_path), "--benchmark", "blobs", *LOADERLESS]
    (tmp_path / "results-blobs.json").write_bytes(damage)
    assert probe.main(flags) == 1 and all(source.read == [] for source in quick_blobs[0])
    assert f"probe.py: {tmp_path}/results-blobs.json is damaged" in capsys.readouterr().err
    assert (tmp_path / "results-blobs.json").read_bytes() == damage


# ---------------------------------------------------------------------- real commands on real files


@pytest.mark.parametrize("name", ["diving48", "ssv2", "imagenet100"])
def test_the_benchmarks_run_from_their_publishers_files(tmp_path, monkeypatch, miniature, name):
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=2))
    flags = [
        "--checkpoint",
        make_checkpoint(tmp_path, "--crop", "32"),
        "--benchmark",
        name,
        *LOADERLESS,
    ]
    assert probe.main([*flags, "--root", str(miniature), "--shots", "all,1"]) == 0
    found, recipe = result(tmp_path, name), BENCHMARKS[name]
    sources = [data.open_dataset(name, miniature, split, 4, 32) for split in ("train", "test")]
    assert list(found["measurements"]) == [
        f"all labels, {recipe.head} head",
        "all labels, standardised head",
        "1 labels, attentive head",
        "1 labels, standardised head",
    ]
    how = found["measurements"][f"all labels, {recipe.head} head"]["how"]
    assert {key: how[key] for key in recipe._fields} == recipe._replace(epochs=1)._asdict()
    clips = [sources[1].evaluation_clip(item) for item in range(len(sources[1]))]
    expected = naive_features(probe.make_encoder({**CONFIG, "seed": 100}), clips, recipe.pooled)
    torch.testing.assert_close(
        stored(tmp_path, len(clips), f"{name}-test").float(), expected, rtol=2e-3, atol=2e-3
    )


def test_own_lists_compare_trained_and_untrained_weights_and_name_what_is_missing(
    tmp_path, monkeypatch, capsys
):
    """Six videos of three classes to learn from, one of them broken; one of those that test is
    of a fourth class."""
    monkeypatch.setattr(probe, "FEW", probe.FEW._replace(steps=2))
    write_dataset(tmp_path / "clips", Shapes(8, 32, 0), 8, 8)
    (tmp_path / "clips" / "000004.mp4").write_bytes(b"no video")
    lists = [tmp_path / "clips" / f"{name}.csv" for name in ("learn", "exam")]
    lists[0].write_text("".join(f"00000{i}.mp4 {i % 3}\n" for i in range(6)))
    lists[1].write_text("000006.mp4 2\n000007.mp4 5\n")
    flags = ["--checkpoint", make_checkpoint(tmp_path / "run", "--crop", "32"), *LOADERLESS]
    flags += ["--train-list", str(lists[0]), "--test-list", str(lists[1])]
    assert probe.main(flags) == 0
    output, names = capsys.readouterr().out, [
        f"{k} labels, {head} head" for k in ("all", 5) for head in ("attentive", "standardised")
    ]
    assert "1 of 6 clips" in output
    seeds = {"": 100, "-untrained": 0}  # whose weights
    parts = re.findall(
        r"^(.*), own-clips-learn-exam(\S*): 5 clips to learn from, "
        r"2 to be tested on, 4 classes, chance "
        r"25.0\n((?:    .*\n)+)",
        output,
        re.M,
    )
    assert [part[:2] for part in parts] == [
        (f"target of {flags[1]}, step 7", ""),
        ("untrained tiny of seed 0", "-untrained"),
    ]
    for _, suffix, lines in parts:
        found = result(tmp_path / "run", f"own-clips-learn-exam{suffix}")
        assert found["sha256"] == probe.encoder_fingerprint(
            probe.make_encoder({**CONFIG, "seed": seeds[suffix]})
        )
        assert "000004.mp4" in found["train"]["unreadable"][0] and [*found["measurements"]] == names
        assert re.findall(r"^    (.*?) +top-1 +[\d.]+", lines, re.M) == names
        assert (
            found["measurements"]["all labels, attentive head"]["how"]["lr"]
            == BENCHMARKS["diving48"].lr
        )
    lists[0].write_text("000000.mp4\n000001.mp4\n")
    assert probe.main(flags) == 1
    assert "each video to learn from needs a label" in capsys.readouterr().err


def test_random_weights_are_evaluated_without_a_checkpoint(tmp_path, monkeypatch, capsys):
    """--seed draws the weights, as train.py draws them, and the first of --seeds heads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "BLOB_CLIPS", (range(4), range(4, 6)))
    flags = ["--untrained", "tiny", "--benchmark", "blobs", "--seed", "3", "--seeds", "2"]
    assert probe.main([*flags, *LOADERLESS]) == 0
    folder = tmp_path / "runs" / "untrained-tiny-seed3"
    found, measured = result(folder, "blobs-untrained"), [
        "all labels, attentive head",
        "all labels, standardised head",
    ]
    assert "untrained tiny of seed 3, blobs-untrained: 4 clips to learn" in capsys.readouterr().out
    encoder = train.build(train.parse(["--seed", "3", "--patch", "16"])[0]).encoder
    assert (
        found["sha256"] == probe.encoder_fingerprint(encoder)
        and [*found["measurements"]] == measured
    )
    sets = [
        Labelled(stored(folder, len(labels), f"blobs-untrained-{split}", np.float32), labels)
        for split, labels in (("train", torch.arange(4)), ("test", torch.arange(4, 6)))
    ]
    expected = naive_features(
        encoder, [synthetic.Blobs(42).video(4 + i)[0][:, :8] for i in range(2)]
    )
    assert expected.shape == (
        2,
        4 * 10 * 10,
        128,
    )  # 8 frames of 160 pixels, in tokens of 2 x 16 x 16
    torch.testing.assert_close(sets[1].features, expected, rtol=1e-4, atol=1e-4)
    assert found["measurements"][measured[0]]["values"] == probe.accuracies(
        BENCHMARKS["blobs"]._replace(epochs=1), *sets, [3, 4], "cpu"
    )


# --------------------------------------------------------------------- checkpoints, foreign weights


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


NO_FILE = "is damaged, cut short, or not a file of tensors that torch.save wrote"


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory):
    return Path(make_checkpoint(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("flag", ["--checkpoint", "--weights"])
def test_a_file_of_anything_else_gives_one_sentence_and_runs_no_code(
    tmp_path, capsys, checkpoint_file, flag
):
    path, harm, whole = tmp_path / "file", Harm(tmp_path / "harm"), checkpoint_file.read_bytes()
    half = len(whole) // 2
    foreign = {
        "--checkpoint": "was not written by this version",
        "--weights": "holds no 'ema_encoder'",
    }[flag]
    cases = [
        (whole[:half], NO_FILE),
        (b"hello", NO_FILE),
        (b"", NO_FILE),
        (pickle.dumps(harm, 2), NO_FILE),
        (b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"F32"', NO_FILE),
        (
            whole[:half] + bytes([whole[half] ^ 16]) + whole[half + 1 :],
            NO_FILE,
        ),
        ({"encoder": harm}, NO_FILE),
        ({"model": {"x": torch.zeros(2)}}, foreign),
        (None, "No such file or directory"),
    ]
    for content, sentence in cases:
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            torch.save(content, path)
        assert probe.main([flag, str(path), "--out", str(tmp_path / "out")]) == 1
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith("probe.py: ") and str(path) in message and sentence in message
        assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_code_is_refused_in_one_sentence(tmp_path, capsys, checkpoint_file):
    path = tmp_path / "last.pt"
    for damage in (
        lambda checkpoint: checkpoint["target"].pop("video"),
        lambda checkpoint: checkpoint["target"].update({"embed.weight": torch.zeros(8, 3)}),
        lambda checkpoint: checkpoint["config"].update(model="vit_huge"),
        lambda checkpoint: checkpoint["config"].pop("model"),
        lambda checkpoint: checkpoint.pop("definition"),
        lambda checkpoint: checkpoint.pop("optimizer"),
    ):
        checkpoint = torch.load(checkpoint_file)
        damage(checkpoint)
        torch.save(checkpoint, path)
        assert probe.main(["--checkpoint", str(path)]) == 1
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith("probe.py: ") and str(path) in message and "version of" in message


def foreign(encoder):
    """The weights of our Encoder under the names of V-JEPA 2.1, written out."""
    kernels = encoder.embed.weight.unflatten(1, (3, encoder.tubelet, encoder.patch, encoder.patch))
    weights = {
        "patch_embed.proj.weight": kernels,
        "patch_embed.proj.bias": encoder.embed.bias,
        "video_mod_embed": encoder.video,
    }
    for i, block in enumerate(encoder.blocks):
        for part, layer in (
            ("norm1", block.norm1),
            ("attn.qkv", block.attn.qkv),
            ("attn.proj", block.attn.proj),
            ("norm2", block.norm2),
            ("mlp.fc1", block.mlp.fc1),
            ("mlp.fc2", block.mlp.fc2),
        ):
            weights |= {
                f"blocks.{i}.{part}.weight": layer.weight,
                f"blocks.{i}.{part}.bias": layer.bias,
            }
    for i, norm in enumerate(encoder.norms):
        weights |= {f"norms_block.{i}.weight": norm.weight, f"norms_block.{i}.bias": norm.bias}
    return {name: weight.detach() for name, weight in weights.items()}


def random_encoder(seed):
    """With every weight random, also the zeros and ones of fresh biases and norms."""
    torch.manual_seed(seed)
    encoder = Encoder(SIZES["tiny"], patch=4, tubelet=2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


UNUSED = {
    "patch_embed_img.proj.weight": torch.zeros(128, 3, 1, 4, 4),
    "patch_embed_img.proj.bias": torch.zeros(128),
    "img_mod_embed": torch.zeros(1, 1, 128),
}


ALL = "encoder", "target_encoder", "ema_encoder"


@pytest.mark.parametrize(
    "prefix, unused, there, taken",
    [
        ("", {}, ALL, "ema_encoder"),
        ("module.", {}, ("target_encoder", "encoder"), "target_encoder"),
        ("backbone.", UNUSED, ALL, "ema_encoder"),
        ("module.backbone.", {}, ("encoder",), "encoder"),
    ],
)
def test_foreign_weights_give_the_same_outputs_and_the_averaged_ones_come_first(
    tmp_path, prefix, unused, there, taken
):
    sources = {name: random_encoder(seed) for seed, name in enumerate(there)}
    weights = {
        name: {prefix + key: weight for key, weight in {**foreign(source), **unused}.items()}
        for name, source in sources.items()
    }
    torch.save(
        {"epoch": 3, "predictor": {"module.x": torch.zeros(2)}, **weights}, tmp_path / "w.pt"
    )
    loaded, about = load_vjepa(tmp_path / "w.pt")
    assert about == {"model": "tiny", "patch": 4, "tubelet": 2}
    clips = torch.randn(2, 3, 4, 12, 8)
    with torch.no_grad():
        assert torch.equal(loaded(clips), sources[taken](clips))


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda weights: weights.pop("blocks.3.attn.qkv.bias"),
            ["Missing", "blocks.3.attn.qkv.bias"],
        ),
        (
            lambda weights: [weights.pop(f"norms_block.{i}.weight") for i in (0, 2)],
            ["norms.0.weight", "norms.2.weight"],
        ),
        (
            lambda weights: weights.update(
                {"cls_token": torch.zeros(1), "blocks.4.norm1.weight": torch.zeros(128)}
            ),
            ["Unexpected", "cls_token", "blocks.4.norm1.weight"],
        ),
        (
            lambda weights: weights.update({"blocks.0.mlp.fc1.weight": torch.zeros(512, 64)}),
            ["blocks.0.mlp.fc1.weight", "[512, 64]", "[512, 128]"],
        ),
        (lambda weights: weights.update({"video_mod_embed": 3}), ["video"]),
        (
            lambda weights: [
                weights.pop(name)
                for name in list(weights)
                if "norms_block" in name or "mod" in name
            ]
            + [weights.update({"norm.weight": torch.ones(128), "norm.bias": torch.zeros(128)})],
            ["weights of V-JEPA 2, which has one norm at its end; V-JEPA 2.1 is needed"],
        ),
        (
            lambda weights: weights.update(
                {"patch_embed.proj.weight": torch.zeros(1408, 3, 2, 16, 16)}
            ),
            ["of a width in", "1408"],
        ),
        (
            lambda weights: weights.pop("patch_embed.proj.weight"),
            ["not an encoder of V-JEPA 2.1"],
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, capsys, change, named):
    weights = foreign(random_encoder(0))
    change(weights)
    torch.save(
        {"encoder": {f"module.{name}": weight for name, weight in weights.items()}},
        tmp_path / "w.pt",
    )
    assert probe.main(["--weights", str(tmp_path / "w.pt"), "--out", str(tmp_path / "run")]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("probe.py: 'encoder' of ") and all(
        name in message for name in named
    ), message
    assert not (tmp_path / "run").exists()


def test_foreign_weights_are_evaluated_like_a_checkpoint(tmp_path, quick_blobs, capsys):
    source = random_encoder(2)
    torch.save({"target_encoder": foreign(source)}, tmp_path / "w.pt")
    flags = [
        "--weights",
        str(tmp_path / "w.pt"),
        "--out",
        str(tmp_path / "run"),
        "--benchmark",
        "blobs",
        *LOADERLESS,
    ]
    assert probe.main(flags) == 0 and f"tiny of {tmp_path}/w.pt" in capsys.readouterr().out
    assert result(tmp_path / "run")["sha256"] == probe.encoder_fingerprint(source)
    expected = naive_features(source, readable(Clips(range(40, 56))))
    torch.testing.assert_close(
        stored(tmp_path / "run", 16, "blobs-test").float(), expected, rtol=2e-3, atol=2e-3
    )


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("", "give one of --checkpoint, --weights and --untrained SIZE"),
        ("--untrained", "give one of"),
        ("--checkpoint a --weights b --out c", "give one of"),
        ("--checkpoint a --untrained tiny", "give one of"),
        ("--untrained huge", "probe.py: --untrained takes tiny, .*, not huge"),
        ("--untrained tiny --clips 20", "not from 192"),
        ("--untrained tiny --benchmark diving", "choice: 'diving'"),
        ("--untrained tiny --shots 0", "not from 1"),
        ("--untrained tiny --shots 1,two", "--shots"),
        ("--untrained tiny --benchmark diving48", "probe.py: .* is missing; README.md"),
        ("--untrained tiny --train-list a.csv", "go together"),
        ("--untrained tiny --train-list a --test-list b --benchmark ssv2", "give one"),
        ("--untrained tiny --probe-epoch 3 --x", "unrecognized"),
        (
            "--untrained tiny --benchmark diving48 --root nowhere",
            "probe.py: .* is missing; README.md",
        ),
        (
            "--untrained tiny --train-list a.csv --test-list b.csv",
            "probe.py: .*a.csv: No such file",
        ),
    ],
)
def test_what_cannot_be_done_gives_one_sentence_and_writes_nothing(
    tmp_path, monkeypatch, capsys, flags, sentence
):
    """Status 2 and argparse's message where flags are wrong, else status 1."""
    monkeypatch.chdir(tmp_path)
    try:
        status = probe.main(flags.split())
    except SystemExit as error:
        status = error.code
    message = capsys.readouterr().err.splitlines()
    assert re.search(sentence, message[-1]) and not list(tmp_path.iterdir())
    assert (status, len(message)) == (1, 1) if sentence.startswith("probe.py") else status == 2


def test_help_and_wrong_flags_need_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for flags, status, text in (
        (["--help"], 0, "example: python probe.py"),
        (["--untrained=tiny", "--train-list=a"], 2, "go together"),
    ):
        process = subprocess.run(
            [sys.executable, probe.__file__, *flags],
            text=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert process.returncode == status and text in process.stdout + process.stderr


def test_nothing_readable_and_features_that_are_not_finite_are_told(tmp_path, quick_blobs, capsys):
    quick_blobs[1]["broken"] = range(200)
    assert (
        probe.main(["--checkpoint", make_checkpoint(tmp_path), "--benchmark", "blobs", *LOADERLESS])
        == 1
    )
    found = capsys.readouterr()
    assert "40 of 40 clips of blobs-train cannot be read" in found.out
    assert "no clip can be read" in found.err
    frozen = make_frozen(tmp_path)
    with torch.no_grad():
        frozen.encoder.norms[3].weight[0] = math.nan
    for source in (Clips(range(4)), Shapes(4, 16, 0)):
        with pytest.raises(ValueError, match="features of x are not finite; did the training"):
            [*probe.encode(frozen.encoder, source, range(4), "x")]
    clips = Labelled(torch.full((4, 1, 8), 1e30), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="what the head computes is not finite"):
        probe.accuracies(Recipe("linear", True, 1e30, 4, 1), clips, clips, [0], "cpu")
