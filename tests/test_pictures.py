"""tests/pictures.py: what masks hide, what colours and axes mean, what is drawn where."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import data
import pictures
from objectives import OBJECTIVES, draw_masks
from synthetic import Shapes
from test_probe import make_checkpoint, make_frozen, naive_features, quick_blobs  # noqa: F401


def cells_of(path, crop, columns=4):
    """A PNG of square pictures with 2 pixels between them, and words above and beside them: float
    [rows, columns, 3, crop, crop] in 0..1."""
    image = torch.tensor(np.array(Image.open(path))).permute(2, 0, 1) / 255
    assert (image[:, :pictures.TOP] < 0.5).sum() > 500  # the title
    rows = (image.shape[1] - pictures.TOP - 2) // (crop + 2)
    assert image.shape[1] == pictures.TOP + rows * (crop + 2) + 2
    image = image[:, pictures.TOP + 2:, :]
    names = image[:, :, :pictures.LEFT].unflatten(1, (rows, crop + 2))
    assert (names[:, :, :14] < 0.5).any(3).any(2).all() and names[:, :, 14:].min() == 1
    image = image[:, :, pictures.LEFT + 2:]
    return torch.stack([torch.stack([image[:, r * (crop + 2):, c * (crop + 2):][:, :crop, :crop]
                                     for c in range(columns)]) for r in range(rows)])


@pytest.mark.parametrize("objective", ["baseline", "amg", "future_predictive"])
def test_pictures_show_the_frames_both_masks_and_features(tmp_path, objective):
    masking, grid = OBJECTIVES[objective].masking, (4, 8, 8)
    frozen, untrained = (make_frozen(tmp_path, seed=seed) for seed in (100, 0))
    clips = Shapes(8, 64, 0).clips(range(4))
    pictures.clip_pictures(frozen, untrained, clips, masking)
    frames = clips[:, :, ::2].transpose(1, 2) / 255  # (4, t, 3, 64, 64)
    large = [
        cells_of(tmp_path / f"{name}.png", 128).unflatten(0, (4, 3))
        for name in ("masks", "features")
    ]
    masks, features = (
        cells[..., ::2, ::2] for cells in large
    )  # clips of 64 pixels are shown twice as large
    for cells, small in zip(large, (masks, features)):
        assert torch.equal(cells, small.repeat_interleave(2, -2).repeat_interleave(2, -1))
        torch.testing.assert_close(small[:, 0], frames, rtol=0, atol=1 / 255)
    generator = torch.Generator().manual_seed(0)
    drawn = draw_masks(clips, generator, generator, grid, masking)  # as a batch is cut
    tint = 0.25 * frames + 0.75 * torch.tensor([1.0, 0.45, 0.0]).view(3, 1, 1)
    for shown, (visible, _) in zip(masks[:, 1:].unbind(1), drawn):
        plain, tinted = (
            ((shown - each).abs() < 1 / 100).all(2) for each in (frames, tint)
        )  # (4, t, 64, 64)
        cells = (
            tinted.unflatten(-1, (8, 8)).unflatten(-3, (8, 8)).float().mean((-1, -3))
        )  # (4, t, 8, 8)
        assert (plain ^ tinted).all() and {*cells.unique().tolist()} == {0.0, 1.0}  # whole tokens
        assert [
            (clip == 0).flatten().nonzero().flatten().tolist() for clip in cells
        ] == visible.tolist()
    tokens = features[:, 1:].unflatten(-1, (8, 8)).unflatten(-3, (8, 8))
    assert (tokens == tokens[..., :1, :, :1]).all()  # one colour per token
    for row, each in enumerate((frozen, untrained)):
        colours = pictures.principal_colours(naive_features(each.encoder, clips)).view(
            4, 4, 8, 8, 3
        )
        torch.testing.assert_close(
            tokens[:, row, :, :, :, 0, :, 0].movedim(2, -1), colours, rtol=0, atol=1 / 255
        )


def test_the_command_writes_three_pictures_the_same_ones_every_time(tmp_path):
    for _ in range(2):
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
        assert pictures.main(["--checkpoint", make_checkpoint(tmp_path), "--clips", "192"]) == 0
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert {*before} == {"masks.png", "features.png", "motion.png"}
    image = np.array(Image.open(tmp_path / "motion.png"))
    assert image.shape == (2 * (400 + 2 * 60), 400 + 5 * 60, 3)
    for panel in (image[:520], image[520:]):  # untrained, trained
        colours = map(ImageColor.getrgb, pictures.COLOURS[:8])
        counts = [(panel[60:461, 60:461] == colour).all(-1).sum() for colour in colours]
        assert min(counts) > 20


def test_clips_of_a_benchmark_are_shown_without_the_unreadable_ones(
    tmp_path, capsys, quick_blobs
):  # noqa: F811
    flags = ["--checkpoint", make_checkpoint(tmp_path), "--benchmark", "blobs", "--clips", "192"]
    quick_blobs[1]["broken"] = range(3, 200)  # what is tested on begins with clip 40
    assert pictures.main(flags) == 1 and not (tmp_path / "masks.png").exists()
    assert "none of the 16 clips can be read; one is blobs42/" in capsys.readouterr().err
    quick_blobs[1]["broken"] = [i for i in range(40, 56) if i not in (51, 44)]
    assert pictures.main(flags) == 0
    source, rows = quick_blobs[0][-1], cells_of(tmp_path / "masks.png", 128, 2)  # 2 clips
    shown = [
        source.evaluation_clip(item - 40)[:, ::2].transpose(0, 1) / 255 for item in (51, 44)
    ]
    small = rows.unflatten(0, (2, 3))[:, 0, ..., ::8, ::8]
    assert any(
        torch.allclose(small, torch.stack(order), atol=1 / 255) for order in (shown, shown[::-1])
    )


def test_the_colours_are_principal_components_of_all_clips_with_a_fixed_sign():
    """Planted: three directions of falling strength. A colour is its component, from the 1st to the
    99th percentile."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    scores = torch.rand(5, 40, 3, generator=generator) - 0.5
    scores -= scores.mean((0, 1))
    tokens = scores * torch.tensor([9.0, 5.0, 2.0]) @ basis[:3] + 7
    colours = pictures.principal_colours(tokens)
    assert colours.shape == (5, 40, 3) and colours.min() == 0 and colours.max() == 1
    for i in range(3):
        correlation = torch.corrcoef(
            torch.stack((scores[..., i].flatten(), colours[..., i].flatten()))
        )[0, 1]
        assert correlation * basis[i][basis[i].abs().argmax()].sign() > 0.98
    torch.testing.assert_close(pictures.principal_colours(tokens.flip(0)).flip(0), colours)
    # One basis and one scale for all clips: equal tokens of two clips have equal colours.
    tokens[3, 7] = tokens[0, 2]
    assert torch.equal(
        pictures.principal_colours(tokens)[3, 7], pictures.principal_colours(tokens)[0, 2]
    )


def test_discriminant_axes_are_fishers():
    """The main eigenvectors of inv(within) @ between, by a solver that knows nothing of
    symmetry."""
    draw = np.random.default_rng(0)
    labels = draw.integers(4, size=300)
    x = (draw.normal(size=(4, 6)) * 2)[labels] + draw.normal(size=(300, 6)) @ draw.normal(
        size=(6, 6)
    )
    x -= x.mean(0)
    within, between = np.zeros((6, 6)), np.zeros((6, 6))
    for label in range(4):
        mean = x[labels == label].mean(0)
        between += np.outer(mean, mean)
        for row in x[labels == label]:
            within += np.outer(row - mean, row - mean) / 300
    within += 1e-3 * np.trace(within) / 6 * np.eye(6)
    values, vectors = np.linalg.eig(np.linalg.inv(within) @ between)
    expected = vectors.real[:, np.argsort(-values.real)[:2]]
    found = pictures.discriminant_axes(torch.tensor(x), torch.tensor(labels)).numpy()
    cosines = (
        (found * expected).sum(0) / np.linalg.norm(found, axis=0) / np.linalg.norm(expected, axis=0)
    )
    assert np.abs(cosines) == pytest.approx([1, 1], abs=1e-9)
