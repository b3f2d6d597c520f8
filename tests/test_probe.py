"""probe.py: heads, few-shot draws and intervals against naive ones; features that survive a kill; foreign weights."""
import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import probe
import sweeps_agree
from miniature import write_datasets
from model import SIZES, Encoder, Size, load_foreign
from probe import BENCHMARKS, Labelled, Recipe
from synthetic import Blobs, Shapes, write_dataset

CONFIG = {"seed": 0, "model": "tiny", "patch": 8, "tubelet": 2, "frames": 4, "crop": 16, "objective": "baseline",
          "as_released": False}


class Clips:
    """A source that needs no decoding: noise, brighter from class to class. Some clips are broken, one kills."""

    def __init__(self, count, broken=(), kills=None, classes=8, folder=None, frames=4):
        self.labels = [item % classes for item in range(count)]
        self.broken, self.kills, self.frames, self.read = broken, kills, frames, []
        self.paths = [f"{folder}/{item}.mp4" for item in range(count)]

    def __len__(self):
        return len(self.labels)

    def where(self, item):
        return "clips", self.paths[item]

    def evaluation_clip(self, item):
        self.read.append(item)
        if item in self.broken:
            raise data.Unreadable(self.paths[item], "it is broken")
        if item == self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = torch.randint(32, (3, 4, 16, 16), generator=torch.Generator().manual_seed(item), dtype=torch.uint8)
        return noise[:, :self.frames] + 32 * self.labels[item]


def make_checkpoint(folder, seed=0, **changes):
    """last.pt as train.py writes it, with random weights: the target's are others than the encoder's."""
    config = {**CONFIG, "seed": seed, **changes}
    target = probe.make_encoder({**config, "seed": seed + 100})
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"config": config, "step": 7, "evaluated": "target", "target": target.state_dict(),
                "encoder": probe.make_encoder(config).state_dict()}, folder / "last.pt")
    return str(folder / "last.pt")


def make_subject(folder, seed=0, frames=4, crop=16):
    config = {**CONFIG, "seed": seed, "frames": frames, "crop": crop}
    return probe.Subject(probe.make_encoder(config), config, "", folder)


@pytest.fixture
def quick_blobs(monkeypatch):
    """The blobs benchmark with `Clips` in the place of blobs."""
    monkeypatch.setattr(data, "BlobVideos", lambda seed, frames, crop, count: Clips(count, folder=seed))


def result(folder, name="blobs"):
    return json.loads((folder / f"results-{name}.json").read_text())


@torch.no_grad()
def naive_features(encoder, clips, pooled=False):
    """The last of the four levels, clip by clip: [n, N or 1, D]."""
    levels = torch.cat([encoder(data.normalise(clip.unsqueeze(0))).unflatten(-1, (4, -1)) for clip in clips])
    tokens = levels[..., 3, :]
    return tokens.mean(1, keepdim=True) if pooled else tokens


def readable(source):
    return [source.evaluation_clip(item) for item in range(len(source)) if item not in source.broken]


# ---------------------------------------------------------------------------------------------------------- recipes


def test_the_benchmarks_are_those_of_the_study():
    """METHOD.md section 8: head, pooling, learning rate, batch, epochs."""
    assert BENCHMARKS == {"diving48": ("attentive", False, 1e-3, 16, 100), "ssv2": ("attentive", True, 1e-3, 16, 100),
                          "imagenet100": ("linear", True, 1e-3, 256, 50), "ucf101": ("attentive", False, 3e-4, 16, 100),
                          "blobs": ("attentive", False, 3e-4, 32, 100)}
    assert probe.WEIGHT_DECAY == 0.01


def test_blobs_are_the_first_frames_resized_in_balanced_directions():
    flags = probe.parse(["--checkpoint", "any", "--benchmark", "blobs"])
    name, *sources = probe.open_sources(flags, frames=8, crop=80)
    assert name == "blobs"
    for source, count, seed in zip(sources, (160, 40), (probe.HELD_OUT, probe.HELD_OUT + 1)):
        assert len(source) == count and np.bincount(source.labels).tolist() == [count // 8] * 8
        clip, (whole, direction) = source.evaluation_clip(9), Blobs(seed).video(9)
        assert clip.shape == (3, 8, 80, 80) and clip.dtype == torch.uint8 and source.labels[9] == direction
        # Bilinear with antialiasing halves a picture by weights 1 3 3 1, so far from the border:
        weights = torch.tensor([1.0, 3, 3, 1]) / 8
        block = whole[1, 5, 39:43, 59:63].float()
        assert clip[1, 5, 20, 30].item() == pytest.approx((weights @ block @ weights).item(), abs=1)
    assert probe.open_sources(flags, 32, 160)[2].evaluation_clip(0).equal(Blobs(probe.HELD_OUT + 1).video(0)[0])


# ------------------------------------------------------------------------------------------------------------ heads


def naive_attentive_logits(head, tokens):
    """One clip [N, D], float64: self-attention of class token and tokens, a head and a query at a time."""
    x = torch.cat((head.token[0], tokens))  # (1 + N, D)
    width = x.shape[1]
    size = width // 8
    weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
    q, k, v = [x @ weight[i * width:(i + 1) * width].T + bias[i * width:(i + 1) * width] for i in range(3)]
    attended = torch.zeros_like(x)
    for h, i in itertools.product(range(8), range(len(x))):
        part = slice(h * size, (h + 1) * size)
        scores = [torch.dot(q[i, part], k[j, part]) / math.sqrt(size) for j in range(len(x))]
        shares = torch.stack(scores).exp() / sum(score.exp() for score in scores)
        for j in range(len(x)):
            attended[i, part] += shares[j] * v[j, part]
    x = x + attended @ head.attention.out_proj.weight.T + head.attention.out_proj.bias
    read = x[0]
    read = (read - read.mean()) / torch.sqrt(((read - read.mean()) ** 2).mean() + 1e-5)
    return (read * head.norm.weight + head.norm.bias) @ head.linear.weight.T + head.linear.bias


def test_the_attentive_head_equals_full_self_attention_read_at_the_class_token():
    torch.manual_seed(0)
    head = probe.AttentiveHead(16, 5).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter))
        tokens = torch.randn(3, 4, 16, dtype=torch.float64)
        expected = torch.stack([naive_attentive_logits(head, clip) for clip in tokens])
        torch.testing.assert_close(head(tokens), expected, rtol=1e-10, atol=1e-10)
        # Pooled clips are clips of one token.
        one = naive_attentive_logits(head, tokens[2, :1])
        torch.testing.assert_close(head(tokens[:, :1])[2], one, rtol=1e-10, atol=1e-10)


def make_set(count, width=16, tokens=3, spread=0.0, seed=0):
    """Clips of four classes; `spread` parts them along an axis for each class, 0 leaves noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    features = torch.randn(count, tokens, width, generator=generator)
    features[torch.arange(count), :, labels] += spread
    return Labelled(features, labels)


@pytest.mark.parametrize("head", ["attentive", "linear", "standardised"])
def test_heads_learn_what_is_separable_and_nothing_from_noise(head):
    recipe = Recipe(head, head == "standardised", 1e-2, 64, 30)
    chance = 25 - 4 * 1.94, 25 + 4 * 1.94  # within four deviations of 500 answers
    for spread, (low, high) in ((8.0, (99, 100)), (0.0, chance)):
        train, test = (make_set(count, spread=spread, seed=seed) for count, seed in ((300, 0), (500, 1)))
        train, test = (train.pool(), test.pool()) if recipe.pooled else (train, test)
        assert low <= probe.accuracy(recipe, train, test, 0, "cpu") <= high, spread


def test_only_the_standardised_head_is_blind_to_scale_and_offset():
    train, test = make_set(200, spread=4.0).pool(), make_set(200, spread=4.0, seed=1).pool()
    scale, offset = torch.logspace(-3, 1, 16), torch.linspace(-5, 5, 16)  # what parts the classes becomes tiny
    moved = [Labelled(clips.features * scale + offset, clips.labels) for clips in (train, test)]
    found = {head: [probe.accuracy(Recipe(head, True, 1e-2, 32, 10), *pair, 0, "cpu")
                    for pair in ((train, test), moved)] for head in ("linear", "standardised")}
    assert min(found["standardised"]) > 95
    assert found["standardised"][0] == pytest.approx(found["standardised"][1], abs=1)
    assert found["linear"][0] > 95 and found["linear"][1] < 60


class Watched:
    """Features that note in which order they are read."""
    shape = (40, 1, 16)

    def __init__(self):
        self.reads = []

    def __getitem__(self, rows):
        self.reads.append(rows.tolist())
        return torch.zeros(len(rows), 1, 16)


def test_every_epoch_sees_each_labelled_clip_once_in_an_order_of_its_own():
    labels = torch.where(torch.arange(40) % 4 == 0, -1, torch.arange(40) % 3)

    def epochs(seed):
        watched, recipe = Watched(), Recipe("linear", True, 1e-3, 8, 3)
        probe.train_head(probe.LinearHead(16, 3), Labelled(watched, labels), recipe, seed, "cpu")
        assert [len(rows) for rows in watched.reads] == [8, 8, 8, 6] * 3
        return [sum(watched.reads[i:i + 4], []) for i in (0, 4, 8)]

    first, second = epochs(0), epochs(1)
    assert first == epochs(0) and len(set(map(tuple, first + second))) == 6
    assert all(sorted(epoch) == [i for i in range(40) if i % 4] for epoch in first + second)


def test_hidden_labels_teach_nothing_and_seeds_give_other_heads():
    recipe, test = Recipe("attentive", False, 1e-2, 16, 3), make_set(200, spread=2.0, seed=1)
    whole = make_set(80, spread=2.0)
    first = Labelled(whole.features[:40], whole.labels[:40])
    hidden = Labelled(whole.features, torch.where(torch.arange(80) < 40, whole.labels, -1))
    assert probe.accuracy(recipe, first, test, 0, "cpu") == probe.accuracy(recipe, hidden, test, 0, "cpu")
    found = [probe.accuracy(recipe._replace(epochs=1), whole, test, seed, "cpu") for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1] and len(set(found)) > 1


# ------------------------------------------------------------------------------------------------------- few labels


@pytest.mark.parametrize("count, t", [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (600, 1.9639)])
def test_the_interval_is_student_ts(count, t):
    values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    deviation = math.sqrt(sum((value - values.mean()) ** 2 for value in values) / (count - 1))
    assert probe.interval(values) == pytest.approx(t * deviation / math.sqrt(count), rel=1e-4)


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


def naive_episode_accuracy(train, test, support, query):
    """In loops and plain Python: percent of the query clips whose nearest class mean is their class's."""
    def unit(vector):
        length = math.sqrt(sum(float(value) ** 2 for value in vector))
        return [float(value) / length for value in vector]

    means = {}
    for clips in support:
        vectors = [unit(train.features[clip, 0]) for clip in clips]
        means[int(train.labels[clips[0]])] = [sum(column) / len(vectors) for column in zip(*vectors)]
    right = 0
    for clip in query:
        vector = unit(test.features[clip, 0])
        distance = {label: sum((a - b) ** 2 for a, b in zip(vector, mean)) for label, mean in means.items()}
        right += min(distance, key=distance.get) == int(test.labels[clip])
    return 100 * right / len(query)


@pytest.mark.parametrize("way, shot", [(4, 1), (2, 5)])
def test_episodes_equal_naive_ones(way, shot):
    train, test = make_set(60, spread=1.0).pool(), make_set(50, spread=1.0, seed=1).pool()
    drawn = probe.draw_episodes(train.labels, test.labels, way, shot, 20, 3)
    expected = [naive_episode_accuracy(train, test, *clips) for clips in drawn]
    found = probe.episode_accuracies(train, test, way, shot, 20, 3)
    assert found.tolist() == pytest.approx(expected) and len(set(expected)) > 5


def test_episodes_hold_the_right_clips_and_depend_on_labels_and_seed_alone():
    train, test = torch.arange(70) % 7, torch.cat((torch.arange(140) % 7, torch.tensor([7] * 9)))
    train[:7] = torch.arange(7)
    test[test == 3] = 2  # class 3 has nothing to test, class 7 nothing to learn from
    drawn = probe.draw_episodes(train, test, 5, 2, 50, 1)
    for support, query in drawn:
        classes = train[support[:, 0]]
        assert support.shape == (5, 2) and (train[support] == classes[:, None]).all()
        assert len(set(classes.tolist())) == 5 and not {3, 7} & set(classes.tolist())
        assert all(len(set(row.tolist())) == 2 for row in support) and len(set(query.tolist())) == len(query)
        assert test[query].unique(return_counts=True)[1].tolist() == [15] * 5
        assert set(test[query].tolist()) == set(classes.tolist())
    again, other = probe.draw_episodes(train, test, 5, 2, 50, 1), probe.draw_episodes(train, test, 5, 2, 50, 2)
    same = [all(map(np.array_equal, a, b)) for a, b in zip(drawn, again)]
    assert all(same) and not any(all(map(np.array_equal, a, b)) for a, b in zip(drawn, other))
    with pytest.raises(ValueError, match="7-way 2-shot episode needs 7 classes .* 6 have them"):
        probe.draw_episodes(train, test, 7, 2, 1, 0)


def test_episodes_are_perfect_on_clusters_and_at_chance_on_noise():
    clusters = make_set(100, spread=40.0).pool(), make_set(100, spread=40.0, seed=1).pool()
    assert (probe.episode_accuracies(*clusters, 4, 1, 30, 0) == 100).all()
    noise = make_set(2000).pool(), make_set(2000, seed=1).pool()
    assert probe.episode_accuracies(*noise, 4, 5, 400, 0).mean().item() == pytest.approx(25, abs=1.5)


def test_synthetic_clips_are_held_out_and_tested_on_others():
    encoder = probe.make_encoder(CONFIG)
    sets = probe.synthetic_sets(encoder, 4, 16, 9, keep_tokens=True)
    assert [clips.tokens for clips in probe.synthetic_sets(encoder, 4, 16, 9)] == [None, None]
    for clips, count, seed in zip(sets, (9, 3), (probe.HELD_OUT, probe.HELD_OUT + 1)):
        source = Shapes(4, 16, seed)
        with torch.no_grad():
            levels = torch.cat([encoder(data.normalise(source.clips([item]))) for item in range(count)])
        torch.testing.assert_close(clips.levels, levels.mean(1, keepdim=True))
        for factor, labels in source.factors(range(count)).items():
            found = clips.pooled(factor)
            torch.testing.assert_close(found.features, naive_features(encoder, source.clips(range(count)), pooled=True))
            assert torch.equal(found.labels, labels) and torch.equal(clips.factors[factor], labels)
        torch.testing.assert_close(clips.tokens, naive_features(encoder, source.clips(range(count))))


def test_the_halves_of_the_channels_partition_them_by_depth_and_within_levels():
    groups = {name: group.tolist() for name, group in probe.channel_groups(4).items()}
    assert groups == {"appearance half by depth": list(range(8)), "dynamics half by depth": list(range(8, 16)),
                      "appearance half within levels": [0, 1, 4, 5, 8, 9, 12, 13],
                      "dynamics half within levels": [2, 3, 6, 7, 10, 11, 14, 15]}


def test_each_probe_of_the_moving_shapes_sees_the_channels_that_it_names(monkeypatch):
    """With a head in the place of `accuracy` that tells which channels tell the factor, one half alone knows."""
    sets = [probe.Generated(torch.zeros(n, 2, 128), torch.zeros(n, 1, 512), {
        factor: torch.arange(n) // i % 8 for i, factor in enumerate(probe.FACTORS, start=1)}) for n in (400, 160)]
    for clips in sets:
        clips.tokens[:, 0, 1] = clips.factors["appearance"].float()
        clips.levels[:, 0, 100] = clips.factors["speed"].float()  # in the first level's second half
        clips.levels[:, 0, 384] = clips.factors["direction"].float() % 4  # the last level's first channel
    monkeypatch.setattr(probe, "synthetic_sets", lambda *arguments, keep_tokens: sets)
    monkeypatch.setattr(probe, "EPISODES", 5)
    monkeypatch.setattr(probe, "episode_accuracies", lambda train, test, way, shot, count, seed: torch.tensor(
        [100.0 * shot * bool(train.features[..., 0].equal(train.labels[:, None] % 4.0)) + way + count]))

    def informed(recipe, train, test, *rest):
        """100 where a channel of the features equals the labels."""
        assert (recipe.head == "attentive") == (train.features.shape[1] == 2)
        return 100.0 * any(train.features[:, 0, i].equal(train.labels.float()) for i in range(train.features.shape[-1]))
    monkeypatch.setattr(probe, "accuracy", informed)
    found = probe.synthetic_results(probe.make_encoder(CONFIG), 4, 16, 400)
    knows = {name: [factor for factor in values if values[factor] == 100] for name, values in found.items()}
    assert knows == {"linear": [], "attentive": ["appearance"], "1-shot": [], "5-shot": [],
                     "appearance half by depth": ["speed"], "dynamics half by depth": [],
                     "appearance half within levels": [], "dynamics half within levels": ["speed"]}
    assert found["1-shot"] == {"direction": 110.0, "appearance": 10.0}
    assert found["5-shot"] == {"direction": 510.0, "appearance": 10.0}


def test_episodes_of_random_weights_know_appearance():
    """Any weights show how large and bright a shape is, and that differs between appearances."""
    encoder = probe.make_encoder({**CONFIG, "frames": 8, "crop": 32})
    sets = [clips.pooled("appearance") for clips in probe.synthetic_sets(encoder, 8, 32, 120)]
    found = probe.episode_measurements(*sets, way=5, episodes=40, seed=0)
    assert list(found) == ["5-way 1-shot episodes", "5-way 5-shot episodes"]
    assert found == probe.episode_measurements(*sets, way=5, episodes=40, seed=0)
    assert all(len(each["values"]) == 40 for each in found.values())
    five = found["5-way 5-shot episodes"]
    assert five["mean"] - five["interval95"] > 20


# -------------------------------------------------------------------------------------------------- features in a file


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_the_last_level_of_every_clip_that_can_be_read(tmp_path, pooled, workers):
    subject, source = make_subject(tmp_path), Clips(40, broken=[0, 17, 18, 39])
    found, note = probe.extract(subject, source, "x", pooled, workers)
    expected = naive_features(subject.encoder, readable(source), pooled)
    assert isinstance(found.features, np.memmap) and found.features.dtype == np.float16
    assert found.features.shape == (36, 1 if pooled else 2 * 2 * 2, 128) and found.features.shape == expected.shape
    torch.testing.assert_close(torch.tensor(found.features).float(), expected, rtol=2e-3, atol=2e-3)
    assert found.labels.tolist() == [source.labels[item] for item in range(40) if item not in source.broken]
    assert [item for item, _ in note["unreadable"]] == [0, 17, 18, 39]
    assert all(source.paths[item] in sentence and "broken" in sentence for item, sentence in note["unreadable"])
    torch.testing.assert_close(found.pool().features, torch.tensor(found.features).float().mean(1, keepdim=True))


def test_a_killed_extraction_goes_on_and_writes_the_same_features_to_the_bit(tmp_path, monkeypatch, exit_status):
    """The source kills its own process when asked for clip 100, in the middle of a batch."""
    flags = ["--benchmark", "blobs", "--workers", "0", "--probe-epochs", "1"]
    checkpoint = make_checkpoint(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(probe, "SAVE_EVERY", 1)
        patch.setattr(data, "BlobVideos", lambda seed, frames, crop, count: Clips(count, [3, 20], 100, folder=seed))
        assert exit_status(lambda: probe.main(["--checkpoint", checkpoint, *flags])) == -signal.SIGKILL
    note = tmp_path / "killed" / "features-blobs-train.json"
    assert json.loads(note.read_text())["done"] == 96 and not list((tmp_path / "killed").glob("*.tmp"))
    sources = []

    def remember(seed, frames, crop, count):
        sources.append(Clips(count, [3, 20], folder=seed))
        return sources[-1]
    monkeypatch.setattr(data, "BlobVideos", remember)
    for folder, first in (("killed", 96), ("whole", 0)):
        assert probe.main(["--checkpoint", make_checkpoint(tmp_path / folder), *flags]) == 0
        assert sources[-2].read == list(range(first, 160))
    for split in ("train", "test"):
        for suffix in ("npy", "json"):
            one, other = ((tmp_path / folder / f"features-blobs-{split}.{suffix}").read_bytes()
                          for folder in ("killed", "whole"))
            assert one == other


def test_features_are_used_again_only_for_the_same_weights_clips_and_sizes(tmp_path):
    def read(subject=None, source=None, pooled=False):
        """How many of five clips an extraction had to read."""
        source = source or Clips(5, folder=tmp_path)
        found, _ = probe.extract(subject or make_subject(tmp_path), source, "x", pooled, 0)
        assert found.labels.tolist() == source.labels
        return len(source.read)

    def relabelled():
        source = Clips(5, folder=tmp_path)
        source.labels[4] = 7
        return source

    changed = make_subject(tmp_path)
    with torch.no_grad():
        changed.encoder.blocks[2].mlp.fc1.bias[5] += 0.5
    assert read() == 5 and read() == 0
    for options in ({"subject": changed}, {"pooled": True}, {"source": Clips(5, folder=tmp_path / "elsewhere")},
                    {"source": relabelled()}, {"subject": make_subject(tmp_path, frames=2, crop=16),
                                               "source": Clips(5, folder=tmp_path, frames=2)}):
        assert read(**options) == 5 and read() == 5, options
    features = torch.tensor(np.load(tmp_path / "features-x.npy")).float()
    expected = naive_features(make_subject(tmp_path).encoder, readable(Clips(5)))
    torch.testing.assert_close(features, expected, rtol=2e-3, atol=2e-3)
    for content in (b"a file", b"a larger file"):
        (tmp_path / "3.mp4").write_bytes(content)
        assert read() == 5 and read() == 0
    assert read(source=Clips(6, folder=tmp_path)) == 6


def test_features_are_made_again_where_the_code_that_reads_clips_has_changed(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("model.py", "data.py", "synthetic.py")]
    for file in files:
        shutil.copy(Path(probe.__file__).with_name(file.name), file)
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "probe.py"))
    found = {probe.source_fingerprint(Clips(3))}
    for file in files:
        file.write_text(file.read_text() + "# changed\n")
        found.add(probe.source_fingerprint(Clips(3)))
    assert len(found) == 4


def test_a_second_probe_of_the_same_clips_fills_the_same_features(tmp_path):
    first, note = probe.open_features(tmp_path / "features-x.npy", (4, 1, 8), "identity")
    second, _ = probe.open_features(tmp_path / "features-x.npy", (4, 1, 8), "identity")
    first[:] = 1
    assert note["done"] == 0 and (second == 1).all() and (np.load(tmp_path / "features-x.npy") == 1).all()


def test_a_head_that_is_not_finite_is_told(tmp_path):
    clips = Labelled(torch.full((4, 1, 8), 1e30), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="not finite"):
        probe.accuracy(Recipe("linear", True, 1e30, 4, 1), clips, clips, 0, "cpu")


def test_encoders_of_the_same_weights_but_other_heads_are_told_apart():
    encoders = [Encoder(Size(16, 4, heads), 8, 2) for heads in (1, 2, 2)]
    for encoder in encoders:
        encoder.load_state_dict(encoders[0].state_dict())
    one, two, three = map(probe.encoder_fingerprint, encoders)
    assert one != two == three


@pytest.mark.parametrize("damage", ["note gone", "note empty", "note cut", "features gone",
                                    "features empty", "features cut", "features half"])
def test_damaged_features_are_made_again(tmp_path, damage):
    subject, source = make_subject(tmp_path), Clips(20)
    whole = np.array(probe.extract(subject, source, "x", False, 0)[0].features)
    file = tmp_path / ("features-x.json" if "note" in damage else "features-x.npy")
    if "gone" in damage:
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:{"empty": 0, "cut": 50, "half": len(content) // 2}[damage.split()[1]]])
    assert np.array_equal(probe.extract(subject, source, "x", False, 0)[0].features, whole)
    assert len(source.read) == 40


def test_a_disk_that_is_too_small_is_told_before_work_begins(tmp_path, monkeypatch):
    source = Clips(20)
    monkeypatch.setattr(probe.shutil, "disk_usage", lambda folder: SimpleNamespace(free=20 * 8 * 128 * 2 - 1))
    with pytest.raises(ValueError, match="20 clips take 0.0 GB"):
        probe.extract(make_subject(tmp_path), source, "x", False, 0)
    assert source.read == [] and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- results


def test_a_result_says_how_it_came_about(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BlobVideos", lambda seed, frames, crop, count:
                        Clips(count // 4, [5], folder=seed, frames=frames))
    checkpoint = make_checkpoint(tmp_path)
    assert probe.main(["--checkpoint", checkpoint, "--benchmark", "blobs", "--seeds", "2", "--workers", "0"]) == 0
    found = result(tmp_path)
    assert found["checkpoint"] == checkpoint and found["encoder"] == "baseline, target encoder at step 7"
    assert found["sha256"] == probe.encoder_fingerprint(probe.make_encoder({**CONFIG, "seed": 100}))
    assert (found["train"]["clips"], found["test"]["clips"]) == (39, 9)
    unreadable = found["train"]["unreadable"] + found["test"]["unreadable"]
    assert ["5.mp4" in sentence for sentence in unreadable] == [True] * 2
    assert list(found["measurements"]) == ["all labels, attentive head"]
    each = found["measurements"]["all labels, attentive head"]
    assert {**each["how"], "labels": 0} == {"head": "attentive", "pooled": False, "lr": 3e-4, "batch": 32,
                                            "epochs": 100, "weight_decay": 0.01, "seeds": [0, 1], "labels": 0}
    assert min(each["values"]) > 60  # classes differ in brightness, and chance is 12.5
    flags = ["--checkpoint", checkpoint, "--benchmark", "blobs", "--probe-epochs", "1", "--workers", "0"]
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for more, name in (["--blob-clips", "80,32"], "80-32"), (["--frames", "2"], "2x16"):
        assert probe.main([*flags, *more]) == 0  # beside what is there
        assert result(tmp_path, f"blobs-{name}")["measurements"]["all labels, attentive head"]["how"]["batch"] == 32
    assert kept == {path: path.read_bytes() for path in kept}
    assert each["mean"] == pytest.approx(sum(each["values"]) / 2)
    assert each["deviation"] == pytest.approx(abs(each["values"][0] - each["values"][1]) / math.sqrt(2))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Few-shot results of two checkpoints with other weights, in folders a and b."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "BlobVideos", lambda seed, frames, crop, count: Clips(count, folder=seed))
        for folder, seed in (("a", 0), ("b", 1)):
            assert probe.main(["--checkpoint", make_checkpoint(root / folder, seed), "--benchmark", "blobs", "--shots",
                               "1,3", "--episodes", "30", "--probe-epochs", "1", "--workers", "0"]) == 0
    return root


@pytest.fixture
def two_results(two_runs, tmp_path, quick_blobs):
    """A copy of both runs to work on: their results."""
    shutil.copytree(two_runs, tmp_path / "runs")
    return [tmp_path / "runs" / folder / "results-blobs.json" for folder in ("a", "b")]


def test_two_checkpoints_get_the_same_draws_and_are_compared_in_pairs(two_results, capsys):
    a, b = (json.loads(path.read_text())["measurements"] for path in two_results)
    names = [f"{shots}-shot, {head} head" for head in ("attentive", "standardised") for shots in (1, 3)]
    assert list(a) == list(b) == ["5-way 1-shot episodes", "5-way 5-shot episodes"] + names
    assert [a[name]["how"] for name in a] == [b[name]["how"] for name in b]
    assert [a[name]["values"] for name in a] != [b[name]["values"] for name in b]
    assert a["3-shot, attentive head"]["how"]["labelled"] == 24 and len(a["3-shot, attentive head"]["values"]) == 5
    capsys.readouterr()
    assert probe.main(["--compare", *map(str, two_results)]) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert len(lines) == len(a)
    for line, name in zip(lines, a):
        difference = np.subtract(b[name]["values"], a[name]["values"])
        half = probe.interval(torch.tensor(difference))
        assert line.startswith(name) and f"{difference.mean():+.2f} ± {half:.2f}" in " ".join(line.split())


def write_results(folder, values, **how):
    """results.json with one measurement; values: a list of top-1 per run, of which each becomes a file."""
    folder.mkdir(exist_ok=True)
    for number, each in enumerate(values):
        probe.write_json(folder / f"{number}.json", {"measurements": {"all labels": {
            "mean": sum(each) / len(each), "values": each, "how": how}}})
    return [str(folder / f"{number}.json") for number in range(len(values))]


def test_several_runs_are_compared_run_by_run(tmp_path, capsys):
    """Means of A 50, 60, 70 and of B 61, 72, 83: differences 11, 12 and 13, t of 2 degrees of freedom is 4.3027."""
    values = [[49.0, 51.0], [60.0, 60.0], [60.0, 80.0], [61.0, 61.0], [70.0, 74.0], [83.0, 83.0]]
    paths = write_results(tmp_path, values, seed=0)
    assert probe.main(["--compare", *paths]) == 0
    assert f"+12.00 ± {4.3027 / 3 ** 0.5:.2f}   A 60.00, B 72.00" in capsys.readouterr().out
    assert probe.main(["--compare", *paths[:3]]) == 1
    assert "has 3 results; give as many of A as of B" in capsys.readouterr().err
    other = write_results(tmp_path / "other", values[:2], seed=1)  # a pair alike, but not like the rest
    assert probe.main(["--compare", paths[0], other[0], paths[1], other[1]]) == 1
    assert "its seed differ" in capsys.readouterr().err


@pytest.mark.parametrize("change, name, odd", [
    (["--seed", "1", "--shots", "1"], "1-shot, attentive head", "seed"),
    (["--probe-epochs", "2", "--shots", "3"], "3-shot, attentive head", "epochs"),
    (["--episodes", "31"], "5-way 1-shot episodes", "episodes"),
])
def test_other_draws_are_named_and_not_compared(two_results, capsys, change, name, odd):
    flags = ["--checkpoint", str(two_results[1].parent / "last.pt"), "--benchmark", "blobs", "--workers", "0"]
    kept = set(json.loads(two_results[1].read_text())["measurements"])
    assert probe.main([*flags, "--probe-epochs", "1", *change]) == 0
    assert set(json.loads(two_results[1].read_text())["measurements"]) == kept  # the others are still there
    capsys.readouterr()
    assert probe.main(["--compare", *map(str, two_results)]) == 0
    lines = {line[:36].strip(): line[37:] for line in capsys.readouterr().out.splitlines()[3:]}
    assert lines.keys() == kept and lines[name] == f"not comparable: its {odd} differ between results"
    assert sum("not comparable" in line for line in lines.values()) == 2  # both heads, both shots


def test_other_labels_are_not_compared_and_replace_what_was_measured_before(two_results, monkeypatch, capsys):
    monkeypatch.setattr(data, "BlobVideos", lambda seed, frames, crop, count: Clips(count, classes=7, folder=seed))
    assert probe.main(["--checkpoint", str(two_results[1].parent / "last.pt"), "--benchmark", "blobs", "--workers", "0",
                       "--episodes", "30"]) == 0
    kept = json.loads(two_results[1].read_text())["measurements"]
    assert list(kept) == ["5-way 1-shot episodes", "5-way 5-shot episodes"]
    assert probe.main(["--compare", *map(str, two_results)]) == 1
    assert "its labels differ" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- real commands on real files


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """All four datasets in their true containers: three classes, of each five clips to train on and one to test."""
    root = tmp_path_factory.mktemp("datasets")
    write_datasets(root, train=5, test=1)
    return root


@pytest.mark.parametrize("benchmark", ["diving48", "ssv2", "imagenet100", "ucf101"])
def test_the_benchmarks_run_from_their_publishers_files(tmp_path, miniature, benchmark):
    checkpoint = make_checkpoint(tmp_path, frames=4, crop=32)
    flags = ["--checkpoint", checkpoint, "--benchmark", benchmark, "--root", str(miniature), "--workers", "0"]
    assert probe.main([*flags, "--probe-epochs", "2"]) == 0
    assert probe.main([*flags, "--probe-epochs", "1", "--shots", "1,5", "--episodes", "10", "--way", "3"]) == 0
    found, recipe = result(tmp_path, benchmark), BENCHMARKS[benchmark]
    assert (found["train"]["clips"], found["test"]["clips"]) == (15, 3)
    few = [f"{k}-shot, {head} head" for head in (recipe.head, "standardised") for k in (1, 5)]
    assert list(found["measurements"]) == [f"all labels, {recipe.head} head", "3-way 1-shot episodes",
                                           "3-way 5-shot episodes", *few]
    how = found["measurements"][f"all labels, {recipe.head} head"]["how"]
    assert {key: how[key] for key in recipe._fields} == recipe._replace(epochs=2)._asdict()
    features = np.load(tmp_path / f"features-{benchmark}-test.npy")
    assert features.shape == (3, 1 if recipe.pooled else 2 * 4 * 4, 128)
    source = data.open_dataset(benchmark, miniature, "test", 4, 32)
    encoder = probe.make_encoder({**CONFIG, "seed": 100})
    expected = naive_features(encoder, [source.evaluation_clip(item) for item in range(3)], recipe.pooled)
    torch.testing.assert_close(torch.tensor(features).float(), expected, rtol=2e-3, atol=2e-3)


def test_lists_of_ones_own_leave_out_and_name_what_is_broken(tmp_path, capsys):
    write_dataset(tmp_path / "clips", Shapes(8, 32, 0), 6, 8)
    (tmp_path / "clips" / "000004.mp4").write_bytes(b"no video")
    checkpoint, videos = make_checkpoint(tmp_path / "run", frames=4, crop=32), str(tmp_path / "clips" / "videos.csv")
    flags = ["--checkpoint", checkpoint, "--train-list", videos, "--test-list", videos]
    assert probe.main([*flags, "--probe-epochs", "1", "--workers", "1", "--untrained"]) == 0
    found = result(tmp_path / "run", "own-clips-videos-untrained")
    assert found["train"]["clips"] == 5 and "000004.mp4" in found["train"]["unreadable"][0]
    assert "1 of 6 clips" in capsys.readouterr().out and found["sha256"] == probe.encoder_fingerprint(
        probe.make_encoder({**CONFIG, "seed": 0}))
    assert found["measurements"]["all labels, attentive head"]["how"]["lr"] == BENCHMARKS["diving48"].lr
    Path(videos).write_text("000000.mp4 0\n000001.mp4 20230101123456\n")
    assert probe.main(flags) == 1
    assert f"{videos} has the label 20230101123456; labels number the classes" in capsys.readouterr().err


def test_without_a_benchmark_it_probes_generated_clips(tmp_path, quick_blobs, capsys):
    flags = ["--checkpoint", make_checkpoint(tmp_path, frames=4, crop=16), "--clips", "192", "--workers", "0"]
    assert probe.main([*flags, "--probe-epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: line.split()[-3:] for line in lines if line.startswith("encoder: ")}
    halves = [f"{half} half {cut}" for cut in ("by depth", "within levels") for half in ("appearance", "dynamics")]
    assert list(table) == [f"encoder: {name}" for name in ("linear", "attentive", "1-shot", "5-shot", *halves)]
    assert table["encoder: 1-shot"][1] == "-" and all(float(cell) >= 0 for cell in table["encoder: linear"])
    assert "blobs: 160 clips to learn from, 40 to be tested on, 8 classes" in lines
    assert result(tmp_path)["benchmark"] == "blobs"


def test_too_little_memory_is_one_sentence(tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(probe, "synthetic_results", full)
    assert probe.main(["--checkpoint", make_checkpoint(tmp_path)]) == 1
    assert capsys.readouterr().err == ("probe.py: there is too little memory; give a smaller number of --clips or "
                                       "--frames, or --crop\n")


# --------------------------------------------------------------------------------------------------- foreign weights


def foreign(encoder):
    """The weights of our Encoder under the names of V-JEPA 2.1, written out."""
    kernels = encoder.embed.weight.unflatten(1, (3, encoder.tubelet, encoder.patch, encoder.patch))
    weights = {"patch_embed.proj.weight": kernels, "patch_embed.proj.bias": encoder.embed.bias,
               "video_mod_embed": encoder.video}
    for i, block in enumerate(encoder.blocks):
        for part, layer in (("norm1", block.norm1), ("attn.qkv", block.attn.qkv), ("attn.proj", block.attn.proj),
                            ("norm2", block.norm2), ("mlp.fc1", block.mlp.fc1), ("mlp.fc2", block.mlp.fc2)):
            weights |= {f"blocks.{i}.{part}.weight": layer.weight, f"blocks.{i}.{part}.bias": layer.bias}
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


UNUSED = {"patch_embed_img.proj.weight": torch.zeros(128, 3, 1, 4, 4), "patch_embed_img.proj.bias": torch.zeros(128),
          "img_mod_embed": torch.zeros(1, 1, 128)}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("unused", [{}, UNUSED])
def test_foreign_weights_give_the_same_outputs_under_every_style_of_names(tmp_path, prefix, unused):
    source = random_encoder(1)
    weights = {prefix + name: weight for name, weight in {**foreign(source), **unused}.items()}
    torch.save({"encoder": weights, "epoch": 3, "predictor": {"module.x": torch.zeros(2)}}, tmp_path / "w.pt")
    loaded, about = load_foreign(tmp_path / "w.pt")
    assert about == {"model": "tiny", "patch": 4, "tubelet": 2, "weights": "encoder"}
    clips = torch.randn(2, 3, 4, 12, 8)
    with torch.no_grad():
        assert torch.equal(loaded(clips), source(clips))


@pytest.mark.parametrize("there, taken", [(("encoder", "target_encoder", "ema_encoder"), "ema_encoder"),
                                          (("target_encoder", "encoder"), "target_encoder"), (("encoder",), "encoder")])
def test_the_averaged_weights_come_first(tmp_path, there, taken):
    sources = {name: random_encoder(seed) for seed, name in enumerate(there)}
    torch.save({name: foreign(source) for name, source in sources.items()}, tmp_path / "w.pt")
    loaded, about = load_foreign(tmp_path / "w.pt")
    assert about["weights"] == taken and torch.equal(loaded.embed.weight, sources[taken].embed.weight)


@pytest.mark.parametrize("size, depth", [("vit_base", 12), ("vit_large", 24)])
def test_the_names_and_shapes_are_those_of_v_jepa(size, depth, tmp_path, monkeypatch):
    """By the issue's list of names; without memory, but the whole loading path, up to the copying."""
    width = SIZES[size].width
    blocks = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
              "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    shapes = {"patch_embed.proj.weight": (width, 3, 2, 16, 16), "patch_embed.proj.bias": (width,),
              "video_mod_embed": (1, 1, width)}
    for i in range(depth):
        for part, shape in blocks.items():
            shapes |= {f"blocks.{i}.{part}.weight": shape, f"blocks.{i}.{part}.bias": shape[:1]}
    for i, kind in itertools.product(range(4), ("weight", "bias")):
        shapes[f"norms_block.{i}.{kind}"] = (width,)
    with torch.device("meta"):
        monkeypatch.setattr(torch, "load", lambda *_, **__: {"ema_encoder": {
            f"module.backbone.{name}": torch.empty(shape) for name, shape in shapes.items()}})
        loaded, about = load_foreign(tmp_path)
    assert about == {"model": size, "patch": 16, "tubelet": 2, "weights": "ema_encoder"}
    shapes["patch_embed.proj.weight"] = (width, 3 * 2 * 16 * 16)  # a linear layer over the pixels of a tubelet
    assert sorted(map(tuple, (p.shape for p in loaded.parameters()))) == sorted(shapes.values())


@pytest.mark.parametrize("change, sentences", [
    (lambda weights: weights.pop("blocks.3.attn.qkv.bias"), ["blocks.3.attn.qkv.bias is missing"]),
    (lambda weights: [weights.pop(f"norms_block.{i}.weight") for i in (0, 2)],
     ["norms_block.0.weight is missing", "norms_block.2.weight is missing"]),
    (lambda weights: weights.update({"cls_token": torch.zeros(1), "blocks.4.norm1.weight": torch.zeros(128)}),
     ["cls_token is left over", "blocks.4.norm1.weight is left over"]),
    (lambda weights: weights.update({"blocks.0.mlp.fc1.weight": torch.zeros(512, 64)}),
     ["blocks.0.mlp.fc1.weight is [512, 64], should be [512, 128]"]),
    (lambda weights: weights.update({"video_mod_embed": 3}), ["video_mod_embed is [], should be [1, 1, 128]"]),
    (lambda weights: weights.update({"patch_embed.proj.weight": torch.zeros(1408, 3, 2, 16, 16)}),
     ["no encoder of a known size", "[1408, 3, 2, 16, 16]"]),
    (lambda weights: weights.pop("patch_embed.proj.weight"), ["patch_embed.proj.weight is missing"]),
])
def test_weights_that_do_not_fit_are_listed(tmp_path, capsys, change, sentences):
    weights = foreign(random_encoder(0))
    change(weights)
    torch.save({"encoder": {f"module.{name}": weight for name, weight in weights.items()}}, tmp_path / "w.pt")
    assert probe.main(["--weights", str(tmp_path / "w.pt"), "--out", str(tmp_path / "run"), "--pictures"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("probe.py: ") and message.count("\n") == 1
    assert all(sentence in message for sentence in sentences), message
    assert len(message.split(" is ")) == 1 + len(sentences) or "known size" in message or "missing" in message
    assert not (tmp_path / "run").exists()


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["code", "list", "other", "cut", "text", "gone"])
def test_a_file_of_anything_else_gives_one_sentence_and_runs_no_code(tmp_path, capsys, kind):
    path = tmp_path / "w.pt"
    content = {"code": {"encoder": Harm(tmp_path / "harm")}, "list": [1, 2], "other": {"model": {"x": torch.zeros(2)}},
               "cut": {"encoder": foreign(random_encoder(0))}}.get(kind)
    if content is not None:
        torch.save(content, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    if kind == "text":
        path.write_text("hello")
    assert probe.main(["--weights", str(path), "--out", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("probe.py: ") and str(path) in message and message.count("\n") == 1
    assert not (tmp_path / "harm").exists()


def test_foreign_weights_are_evaluated_like_a_checkpoint(tmp_path, quick_blobs, capsys):
    source = random_encoder(2)
    weights = {f"module.{name}": weight for name, weight in foreign(source).items()}
    torch.save({"target_encoder": weights}, tmp_path / "w.pt")
    flags = ["--weights", str(tmp_path / "w.pt"), "--out", str(tmp_path / "run"), "--frames", "4", "--crop", "16"]
    assert probe.main([*flags, "--benchmark", "blobs", "--probe-epochs", "1", "--workers", "0"]) == 0
    assert "tiny from 'target_encoder'" in capsys.readouterr().out
    assert result(tmp_path / "run", "blobs-4x16")["sha256"] == probe.encoder_fingerprint(source)
    features = np.load(tmp_path / "run" / "features-blobs-4x16-test.npy")
    expected = naive_features(source, readable(Clips(40)))
    torch.testing.assert_close(torch.tensor(features).float(), expected, rtol=2e-3, atol=2e-3)


# --------------------------------------------------------------------------------------------------- a sweep's table


def write_sweep(folder, direction, appearance):
    """result.json and metrics.csv of runs as train.py writes them, the latter the same for every seed and with a
    hard_share for hw. direction, appearance: {objective: a value per seed}; 3 decimals."""
    for name, values in direction.items():
        for seed, (first, second) in enumerate(zip(values, appearance[name])):
            found = {"linear": {"direction": first, "speed": 25.0, "appearance": second},
                     "5-shot": {"direction": first, "appearance": first}}
            probe_run = folder / f"{name}-seed{seed}"
            probe_run.mkdir(parents=True)
            share = [",hard_share", ",0.9", ",0.7", ",0.95"] if name == "hw" else [""] * 4
            (probe_run / "metrics.csv").write_text("".join(f"{line}{more}\n" for line, more in zip(
                ("step,pred", "0,0.75", "10,0.25", "19,0.5"), share)))
            (probe_run / "result.json").write_text(json.dumps({
                "config": {"seed": seed}, "last": {"effective_rank": "7.5", "feature_std": "0.125"},
                "trained": found, "untrained": {"linear": {"direction": 10.0, "speed": 25.0, "appearance": 20.0}}}))


def table_of(text, number):
    """The cells of one of the printed Markdown tables by row and column."""
    blocks = re.findall(r"((?:^\|.*\n)+)", text, re.M)
    lines = blocks[number].splitlines()
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: dict(zip(header[1:], line[1:])) for line in lines}


def test_the_table_holds_means_deviations_and_paired_differences(tmp_path, capsys):
    """ld is far above the baseline in every seed, hw on average alone. Student's t for 2 degrees of freedom: 4.3027."""
    direction = {"ld": [60.0, 62.0, 64.0], "baseline": [50.0, 51.0, 55.0], "hw": [49.0, 60.0, 56.0]}
    write_sweep(tmp_path, direction, {name: [70.0, 70.0, 71.0] for name in direction})
    assert probe.main(["--table", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    values, logged, differences = (table_of(text, number) for number in (0, 3, 4))
    assert list(values) == ["untrained", "baseline", "hw", "ld"] and list(differences) == ["hw", "ld"]
    for name, numbers in direction.items():
        mean = sum(numbers) / 3
        deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / 2)
        assert values[name]["direction, linear"] == f"{mean:.1f} ± {deviation:.1f}"
        assert (values[name]["effective rank"], values[name]["feature std"]) == ("7.5 ± 0.0", "0.125 ± 0.000")
        if name != "baseline":
            paired = [number - reference for number, reference in zip(numbers, direction["baseline"])]
            mean = sum(paired) / 3
            half = 4.3027 * math.sqrt(sum((number - mean) ** 2 for number in paired) / 2 / 3)
            cell = f"{mean:+.1f} ± {half:.1f}"
            assert differences[name]["direction, linear"] == (cell if name == "ld" else f"({cell})")
    assert values["untrained"]["direction, linear"] == "10.0 ± 0.0" and values["ld"]["speed, attentive"] == "-"
    assert values["untrained"]["effective rank"] == "-" and values["ld"]["seeds"] == "3"
    assert list(logged) == ["baseline", "hw", "ld"] and list(logged["ld"].values()) == [
        "0.750 ± 0.000", "0.500 ± 0.000", "-", "-", "-"]
    assert list(logged["hw"].values())[2:] == ["0.700 ± 0.000", "0.850 ± 0.000", "0.950 ± 0.000"]


def test_seeds_that_only_one_of_two_has_are_left_out_of_the_difference(tmp_path, capsys):
    direction = {"baseline": [50.0, 51.0, 90.0], "ld": [60.0, 62.0], "hw": [7.0]}
    write_sweep(tmp_path, direction, {name: [70.0, 70.0, 71.0] for name in direction})
    assert probe.main(["--table", str(tmp_path)]) == 0
    differences = table_of(capsys.readouterr().out, 4)
    # Differences 10 and 11: mean 10.5, deviation 0.7071, and t of 1 degree of freedom is 12.706.
    assert differences["ld"]["direction, linear"] == f"+10.5 ± {12.7062 * 0.5 ** 0.5 / 2 ** 0.5:.1f}"
    assert differences["hw"]["direction, linear"] == "-"
    assert probe.main(["--table", str(tmp_path), "--reference", "ld"]) == 0  # 50 - 60 and 51 - 62
    differences = table_of(capsys.readouterr().out, 4)
    assert probe.main(["--table", str(tmp_path), "--reference", "fac"]) == 1
    assert "no run of 'fac' to compare with; it holds untrained, baseline, hw, ld" in capsys.readouterr().err
    assert differences["baseline"]["direction, linear"] == f"-10.5 ± {12.7062 * 0.5 ** 0.5 / 2 ** 0.5:.1f}"


def test_two_sweeps_agree_where_their_differences_have_one_sign(tmp_path, capsys):
    """Of 12 differences, two objectives in six columns, the first shows three, and the second their opposites."""
    direction = {"baseline": [50.0, 51.0, 55.0], "hw": [49.0, 60.0, 56.0], "ld": [60.0, 62.0, 64.0]}
    for name, ld in (("before", direction["ld"]), ("after", [40.0, 41.0, 45.5])):
        write_sweep(tmp_path / name, {**direction, "ld": ld}, dict.fromkeys(direction, [70.0, 70.0, 71.0]))
        assert probe.main(["--table", str(tmp_path / name)]) == 0
        (tmp_path / f"{name}.md").write_text("Of a README\n\n" + capsys.readouterr().out)
    for second, sentences in (("before", ("3 have the same sign", "12 of all 12")),
                              ("after", ("0 have the same sign", "3 are shown there", "9 of all 12"))):
        sweeps_agree.main(tmp_path / "before.md", tmp_path / f"{second}.md")
        output = capsys.readouterr().out
        assert output.startswith("3 of 12 differences") and all(sentence in output for sentence in sentences)
    (tmp_path / "empty.md").write_text("")
    with pytest.raises(ValueError, match="empty.md holds no table"):
        sweeps_agree.main(tmp_path / "before.md", tmp_path / "empty.md")


def test_runs_with_other_settings_are_not_tabulated_together(tmp_path, capsys):
    write_sweep(tmp_path, {"baseline": [50.0], "ld": [60.0]}, {"baseline": [50.0], "ld": [60.0]})
    path = tmp_path / "ld-seed0" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "config": {"seed": 0, "objective": "ld"}}))
    assert probe.main(["--table", str(tmp_path)]) == 0
    path.write_text(json.dumps({**result, "config": {"seed": 0, "steps": 9}}))
    assert probe.main(["--table", str(tmp_path)]) == 1
    assert "ld-seed0 has other settings" in capsys.readouterr().err


def naive_rank_correlation(first, second):
    """1 - 6 sum d^2 / (n (n^2 - 1)), for values that are all different."""
    places = [{value: place for place, value in enumerate(sorted(values))} for values in (first, second)]
    squares = sum((places[0][a] - places[1][b]) ** 2 for a, b in zip(first, second))
    return 1 - 6 * squares / (len(first) * (len(first) ** 2 - 1))


def test_the_trade_off_is_spearmans_and_its_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 27, generator=generator, dtype=torch.float64)
    expected = naive_rank_correlation(first.tolist(), second.tolist())
    assert probe.rank_correlation(first, second).item() == pytest.approx(expected)
    assert probe.rank_correlation(first, first.exp()).item() == pytest.approx(1)
    assert probe.rank_correlation(first, -first ** 3).item() == pytest.approx(-1)
    # Ties share the mean of their ranks: the 2s hold places 2 and 3, the 5s 4 to 6.
    assert probe.ranks(torch.tensor([5, 2, 1, 2, 5, 5])).tolist() == [5, 2.5, 1, 2.5, 5, 5]
    low, high = probe.bootstrap(first, second)
    assert low < expected < high and (low, high) == tuple(probe.bootstrap(first, second))
    covered = 0
    for _ in range(100):  # independent: the truth is 0
        low, high = probe.bootstrap(*torch.randn(2, 27, generator=generator), draws=200)
        covered += low <= 0 <= high
    assert 85 <= covered <= 99


def test_the_trade_off_counts_the_named_objectives_alone(tmp_path, capsys):
    names = ["baseline", "hw", "ld", "delta", "fwm", "ac", "ltc"]
    direction = {name: [50.0 + 3 * i, 51.0 + 3 * i] for i, name in enumerate(names)}
    appearance = {name: [70.0 - i ** 2, 71.0 - i ** 2] for i, name in enumerate(names)}
    write_sweep(tmp_path, {**direction, "ld-as-released": [99.0, 99.0]}, {**appearance, "ld-as-released": [99.0, 99.0]})
    assert probe.main(["--table", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\(linear\) over 6 objectives: -1.00, 95 % interval \[-1.00, -1.00\]", text)
    assert re.search(r"\(5-shot\) over 6 objectives: \+1.00, 95 % interval \[\+1.00, \+1.00\]", text)
    assert list(table_of(text, 0))[-1] == "ld-as-released"


# -------------------------------------------------------------------------------------------------------- pictures


def cells_of(path, crop):
    """A PNG of square pictures with 2 pixels between them: float [rows, columns, 3, crop, crop] in 0..1."""
    image = torch.tensor(np.array(Image.open(path))).permute(2, 0, 1) / 255
    rows, columns = ((size - 2) // (crop + 2) for size in image.shape[1:])
    assert image.shape == (3, rows * (crop + 2) + 2, columns * (crop + 2) + 2)
    return torch.stack([torch.stack([image[:, 2 + r * (crop + 2):, 2 + c * (crop + 2):][:, :crop, :crop]
                                     for c in range(columns)]) for r in range(rows)])


@pytest.mark.parametrize("objective", ["baseline", "amg", "future_predictive"])
def test_pictures_show_the_frames_both_masks_and_features(tmp_path, objective):
    checkpoint = make_checkpoint(tmp_path, frames=8, crop=64, objective=objective)
    assert probe.main(["--checkpoint", checkpoint, "--pictures"]) == 0
    first = (tmp_path / "masks.png").read_bytes(), (tmp_path / "features.png").read_bytes()
    assert probe.main(["--checkpoint", checkpoint, "--pictures"]) == 0
    assert first == ((tmp_path / "masks.png").read_bytes(), (tmp_path / "features.png").read_bytes())
    clips = Shapes(8, 64, probe.HELD_OUT).clips(range(4))
    frames = clips[:, :, ::2].transpose(1, 2) / 255  # (4, t, 3, 64, 64)
    large = [cells_of(tmp_path / f"{name}.png", 128).unflatten(0, (4, 3)) for name in ("masks", "features")]
    masks, features = (cells[..., ::2, ::2] for cells in large)  # clips of 64 pixels are shown twice as large
    for cells, small in zip(large, (masks, features)):
        assert torch.equal(cells, small.repeat_interleave(2, -2).repeat_interleave(2, -1))
    assert masks.shape == features.shape == (4, 3, 4, 3, 64, 64)
    for shown in (masks[:, 0], features[:, 0]):
        torch.testing.assert_close(shown, frames, rtol=0, atol=1 / 255)
    colour = torch.tensor(probe.HIDDEN_COLOUR).view(3, 1, 1)
    for mask, shares in ((1, (0.1, 1.0)), (2, (0.3, 1.0))):
        shown = masks[:, mask]
        plain = ((shown - frames).abs() < 1 / 100).all(2)
        tinted = ((shown - (0.25 * frames + 0.75 * colour)).abs() < 1 / 100).all(2)  # (4, t, 64, 64)
        assert (plain ^ tinted).all()
        cells = tinted.unflatten(-1, (8, 8)).unflatten(-3, (8, 8)).float().mean((-1, -3))  # (4, t, 8, 8)
        assert set(cells.unique().tolist()) == {0.0, 1.0}  # whole tokens
        assert all(shares[0] < share < shares[1] for share in cells.mean((1, 2, 3)))
        if objective == "future_predictive":
            assert (cells[:, 2:] == 1).all()
        else:
            assert (cells == cells[:, :1]).all()  # blocks span all of the time
    tokens = features[:, 1:].unflatten(-1, (8, 8)).unflatten(-3, (8, 8))
    assert (tokens == tokens[..., :1, :, :1]).all()  # one colour per token
    for row, encoder in ((1, probe.make_encoder({**CONFIG, "seed": 100})), (2, probe.make_encoder(CONFIG))):
        colours = probe.principal_colours(naive_features(encoder, clips)).view(4, 4, 8, 8, 3)  # trained, then untrained
        torch.testing.assert_close(tokens[:, row - 1, :, :, :, 0, :, 0].movedim(2, -1), colours, rtol=0, atol=1 / 255)


def test_masks_in_the_picture_hide_exactly_the_tokens_that_are_not_visible():
    frames = torch.zeros(2, 3, 6, 9)
    shown = probe.hide(frames, torch.tensor([0, 4, 6, 11]), grid=(2, 2, 3), patch=3)
    hidden = (shown[:, 0] > 0).view(2, 2, 3, 3, 3).float().mean((2, 4))
    assert hidden.flatten().nonzero().flatten().tolist() == [1, 2, 3, 5, 7, 8, 9, 10]


def test_the_colours_are_principal_components_of_all_clips_with_a_fixed_sign():
    """Planted: three directions of falling strength. A colour is its component, from the 1st to the 99th percentile."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    scores = torch.rand(5, 40, 3, generator=generator) - 0.5
    scores -= scores.mean((0, 1))
    tokens = scores * torch.tensor([9.0, 5.0, 2.0]) @ basis[:3] + 7
    colours = probe.principal_colours(tokens)
    assert colours.shape == (5, 40, 3) and colours.min() == 0 and colours.max() == 1
    for i in range(3):
        correlation = torch.corrcoef(torch.stack((scores[..., i].flatten(), colours[..., i].flatten())))[0, 1]
        sign = basis[i][basis[i].abs().argmax()].sign()
        assert correlation * sign > 0.98
    torch.testing.assert_close(probe.principal_colours(tokens.flip(0)).flip(0), colours)
    # One basis and one scale for all clips: equal tokens of two clips have equal colours.
    tokens[3, 7] = tokens[0, 2]
    assert torch.equal(probe.principal_colours(tokens)[3, 7], probe.principal_colours(tokens)[0, 2])


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("damage, sentence", [
    (lambda checkpoint: checkpoint["encoder"].pop("video"), "an encoder of another version of model.py"),
    (lambda checkpoint: checkpoint["encoder"].update({"embed.weight": torch.zeros(8, 3)}), "of another version"),
    (lambda checkpoint: checkpoint["config"].update(model="vit_huge"), "of another version"),
    (lambda checkpoint: checkpoint["config"].pop("model"), "of another version"),
    (lambda checkpoint: checkpoint.pop("target"), "was not written by this project's train.py"),
])
def test_a_checkpoint_of_other_code_is_refused_in_one_sentence(tmp_path, capsys, damage, sentence):
    path = make_checkpoint(tmp_path)
    checkpoint = torch.load(path)
    damage(checkpoint)
    torch.save(checkpoint, path)
    assert probe.main(["--checkpoint", path]) == 1
    error = capsys.readouterr().err
    assert sentence in error and path in error and error.count("\n") == 1


@pytest.mark.parametrize("flags, sentence", [
    ([], "give one of --checkpoint, --weights, --compare and --table"),
    (["--checkpoint", "a", "--weights", "b", "--out", "c"], "give one of"),
    (["--checkpoint", "nowhere/last.pt"], "no checkpoint at nowhere/last.pt"),
    (["--weights", "nowhere.pt"], "--weights needs --out"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "diving"], "invalid choice: 'diving'"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "diving48"], "--benchmark diving48 needs --root"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "diving48", "--root", "nowhere"], "is missing; it should hold"),
    (["--checkpoint", "CHECKPOINT", "--train-list", "a.csv"], "go together"),
    (["--checkpoint", "CHECKPOINT", "--train-list", "a.csv", "--test-list", "b.csv"], "a.csv"),
    (["--checkpoint", "CHECKPOINT", "--train-list", "a", "--test-list", "b", "--benchmark", "ssv2"], "give one"),
    (["--checkpoint", "CHECKPOINT", "--shots", "1"], "--shots and --episodes need --benchmark"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "blobs", "--shots", "1,two"], "--shots"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "blobs", "--shots", "0"], "0 is less than 1"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "blobs", "--episodes", "0"], "0 is less than 1"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "blobs", "--episodes", "--way", "9"], "needs 9 classes"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "blobs", "--episodes", "--way", "1"], "1 is less than 2"),
    (["--checkpoint", "CHECKPOINT", "--episodes"], "--shots and --episodes need --benchmark"),
    (["--checkpoint", "CHECKPOINT", "--pictures", "--benchmark", "blobs", "--shots", "1"], "--pictures goes without"),
    (["--checkpoint", "CHECKPOINT", "--root", "nowhere"], "--root is for --benchmark"),
    (["--checkpoint", "CHECKPOINT", "--reference", "ld"], "--reference is for --table"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "blobs", "--frames", "34"], "34 are too many"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "blobs", "--crop", "30"], "does not divide into 8x8 patches"),
    (["--checkpoint", "CHECKPOINT", "--probe-epoch", "3"], "--probe-epoch"),
    (["--checkpoint", "OTHER", "--pictures"], "'smooth' is not in objectives.py"),
    (["--checkpoint", "CHECKPOINT", "--clips", "20"], "at least 192"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "blobs", "--seed", "-1"], "--seed: -1 is less than 0"),
    (["--checkpoint", "CHECKPOINT", "--benchmark", "blobs", "--blob-clips", "160"], "two numbers"),
    (["--compare", "a.json", "b.json"], "a.json is missing, or is no result"),
    (["--table", "nowhere"], "nowhere holds no finished run"),
])
def test_bad_input_gives_one_sentence_and_writes_no_result(tmp_path, monkeypatch, capsys, flags, sentence):
    checkpoints = {"CHECKPOINT": make_checkpoint(tmp_path / "run"),
                   "OTHER": make_checkpoint(tmp_path / "other", objective="smooth")}
    monkeypatch.chdir(tmp_path)
    if "--way" in flags:
        monkeypatch.setattr(data, "BlobVideos", lambda seed, frames, crop, count: Clips(count, folder=seed))
    assert probe.main([checkpoints.get(flag, flag) for flag in flags]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("probe.py: ") and sentence in message
    assert not list(tmp_path.rglob("results-*"))


def test_nothing_readable_and_features_that_are_not_finite_are_told(tmp_path, monkeypatch, capsys):
    checkpoint = make_checkpoint(tmp_path)
    monkeypatch.setattr(data, "BlobVideos", lambda seed, frames, crop, count: Clips(count, range(count), folder=seed))
    flags = ["--checkpoint", checkpoint, "--benchmark", "blobs", "--workers", "0"]
    assert probe.main(flags) == 1 and "no clip of blobs-train can be read" in capsys.readouterr().err
    assert probe.main([*flags, "--pictures"]) == 1 and "none of the 40 clips can be read" in capsys.readouterr().err
    subject = make_subject(tmp_path)
    with torch.no_grad():
        subject.encoder.norms[3].weight[0] = 1e6
    with pytest.raises(ValueError, match="not finite in float16"):
        probe.extract(subject, Clips(4), "x", False, 0)


def test_a_result_that_is_there_survives_an_error(two_results, monkeypatch):
    before = two_results[0].read_bytes()
    monkeypatch.setattr(probe.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk is full")))
    assert probe.main(["--checkpoint", str(two_results[0].parent / "last.pt"), "--benchmark", "blobs"]) == 1
    assert two_results[0].read_bytes() == before
