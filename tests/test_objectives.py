"""Masks, the core loss, every auxiliary term and every named objective against METHOD.md sections 3
to 6.

The `naive_...` functions share no code with objectives.py: features stand in dictionaries by (time,
row, column), one token is handled at a time, all in float64. Weights and gates that METHOD.md keeps
free of gradients are plain Python numbers here, so that equal gradients also prove that none runs
through them.
"""
import inspect
import itertools
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from model import take
from objectives import (HEADS, OBJECTIVES, TERMS, Masking, MaskOutputs, Outputs, Term, check_terms,
                        coefficients, context_loss, distance, draw_block_size, epps_pulley,
                        hard_share, losses, make_heads, mean_over_pairs, middle_pixels, motion_map,
                        place_blocks, prediction_loss, released_form, sample_masks)
from objectives import describe as describe_objective

LEVEL_WIDTH = 3  # D
CHANNELS = 4 * LEVEL_WIDTH
FRAMES_PER_STEP, PIXEL_ROWS, PIXEL_COLUMNS = 2, 3, 2  # the pixels of one token


def cells_of(grid):
    """Every (time, row, column) in raster order, time slowest: a token's id is its place in this
    list."""
    return list(itertools.product(*map(range, grid)))


# -------------------------------------------------------------------------------- hand-made outputs


def ragged_visible(grid, batch, share, whole, generator):
    """Visible tokens, as a list per clip: a random subset, not a tube, that holds `whole` positions
    at all times."""
    cells = cells_of(grid)
    clips = []
    for _ in range(batch):
        positions = generator.sample(list(itertools.product(range(grid[1]), range(grid[2]))), whole)
        always = [token for token, cell in enumerate(cells) if cell[1:] in positions]
        others = [token for token in range(len(cells)) if token not in always]
        clips.append(
            sorted(always + generator.sample(others, int(share * len(cells)) - len(always)))
        )
    return clips


def visible_without_pairs(grid, batch, generator):
    """Visible tokens at even time steps only, so that no visible token's next time step is
    visible."""
    even = [token for token, cell in enumerate(cells_of(grid)) if cell[0] % 2 == 0]
    return [sorted(generator.sample(even, len(even) // 2)) for _ in range(batch)]


def make_outputs(grid, batch, pairs_in=(True, True), seed=0):
    """Random features, in float64 and with gradients. pairs_in: which of the two masks hold pairs
    at all.

    The first mask with pairs has positions that are visible at every time step (what `spectral`
    needs), the other few or none. The last masked token is left out, as cutting a batch to equal
    counts does.
    """
    choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def features(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = math.prod(grid)
    masks = []
    for mask, has_pairs in enumerate(pairs_in):
        if has_pairs:
            share, whole = (0.7, 2) if mask == pairs_in.index(True) else (0.4, 0)
            visible = ragged_visible(grid, batch, share, whole, choice)
        else:
            visible = visible_without_pairs(grid, batch, choice)
        masked = [[token for token in range(count) if token not in clip][:-1] for clip in visible]
        n, k = len(visible[0]), len(masked[0])
        made = (features(batch, count, CHANNELS).requires_grad_() for count in (n, k, n))
        masks.append(MaskOutputs(torch.tensor(visible), torch.tensor(masked), *made))
    t, h, w = grid
    clips = features(batch, 3, t * FRAMES_PER_STEP, h * PIXEL_ROWS, w * PIXEL_COLUMNS)
    return Outputs(clips, grid, features(batch, count, CHANNELS).requires_grad_(), masks)


def make_head(*widths, seed=0):
    """A small float64 network with GELU between its linear layers."""
    torch.manual_seed(seed)
    layers = [nn.Linear(widths[0], widths[1])]
    for wide, narrow in zip(widths[1:], widths[2:]):
        layers += [nn.GELU(), nn.Linear(wide, narrow)]
    return nn.Sequential(*layers).double()


# ---------------------------------------------------------------------------------- naive core loss


def average(values):
    values = list(values)
    return sum(values) / len(values)


def absolute_mean(channels):
    return channels.abs().mean()


def masked_errors(outputs, mask):
    """For each clip, the list of its masked tokens' mean absolute prediction errors."""
    return [
        [
            absolute_mean(prediction - outputs.h[clip, token])
            for prediction, token in zip(mask.p[clip], tokens)
        ]
        for clip, tokens in enumerate(mask.masked.tolist())
    ]


def naive_prediction(outputs):
    return average(
        average(itertools.chain(*masked_errors(outputs, mask))) for mask in outputs.masks
    )


def naive_distance(cells, visible, masked):
    """Each visible token's Euclidean distance to the nearest masked token of one clip."""
    return [
        min(
            math.sqrt(sum((a - b) ** 2 for a, b in zip(cells[token], cells[other])))
            for other in masked
        )
        for token in visible
    ]


def naive_context(outputs):
    cells = cells_of(outputs.grid)
    per_mask = []
    for mask in outputs.masks:
        errors = []
        for clip, tokens in enumerate(mask.visible.tolist()):
            distances = naive_distance(cells, tokens, mask.masked[clip].tolist())
            errors += [
                absolute_mean(mask.c[clip, i] - outputs.h[clip, token]) / math.sqrt(distances[i])
                for i, token in enumerate(tokens)
            ]
        per_mask.append(average(errors))
    return average(per_mask)


# ---------------------------------------------------------------------------- naive auxiliary terms


class Pair(NamedTuple):
    """A visible token whose next time step, at the same row and column, is visible too."""
    clip: int
    cell: tuple  # (time, row, column)
    z: torch.Tensor
    z_next: torch.Tensor
    h: torch.Tensor
    h_next: torch.Tensor


def pairs_of(outputs, mask):
    cells, pairs = cells_of(outputs.grid), []
    for clip, tokens in enumerate(mask.visible.tolist()):
        z = {cells[token]: features for token, features in zip(tokens, mask.z[clip])}
        h = dict(zip(cells, outputs.h[clip].detach()))
        for time, row, column in z:
            now, later = (time, row, column), (time + 1, row, column)
            if later in z:
                pairs.append(Pair(clip, now, z[now], z[later], h[now], h[later]))
    return pairs


def average_over_masks(values_per_mask):
    """Each mask's mean over its valid positions; a mask without any is left out, and with none at
    all it is zero."""
    means = [average(values) for values in values_per_mask if values]
    return average(means) if means else torch.zeros((), dtype=torch.float64, requires_grad=True)


def weigh_by_softmax(errors):
    """n * softmax(error) * error of n errors; the weights are plain numbers, without gradient."""
    exponentials = [math.exp(error.item()) for error in errors]
    return [
        len(errors) * exponential / sum(exponentials) * error
        for exponential, error in zip(exponentials, errors)
    ]


def naive_hw(outputs):
    return average(average(itertools.chain(*(weigh_by_softmax(errors)
                                             for errors in masked_errors(outputs, mask))))
                   for mask in outputs.masks)


def naive_hard_share(outputs):
    """(sum w)^2 / (k sum w^2) of the softmax weights w of each clip's k masked tokens, averaged."""
    shares = []
    for mask in outputs.masks:
        for errors in masked_errors(outputs, mask):
            weights = [math.exp(error.item()) for error in errors]
            shares.append(sum(weights) ** 2 / (len(weights) * sum(weight**2 for weight in weights)))
    return torch.tensor(average(shares), dtype=torch.float64)


def naive_delta(outputs):
    return average_over_masks([[absolute_mean((pair.z_next - pair.z) - (pair.h_next - pair.h))
                                for pair in pairs_of(outputs, mask)] for mask in outputs.masks])


def cut(ratio):
    """(appearance, dynamics): lists of channels. Appearance is the first `ratio` of all
    channels."""
    appearance = list(range(int(ratio * CHANNELS)))
    return appearance, [channel for channel in range(CHANNELS) if channel not in appearance]


def seen_by_head(z, dynamics_only):
    return z[cut(0.5)[1]] if dynamics_only else z


def naive_ld(outputs, head, dynamics_only=False, hard=False):
    per_mask = []
    for mask in outputs.masks:
        errors = [absolute_mean(head(seen_by_head(pair.z, dynamics_only)) - (pair.h_next - pair.h))
                  for pair in pairs_of(outputs, mask)]
        per_mask.append(weigh_by_softmax(errors) if hard else errors)
    return average_over_masks(per_mask)


def naive_fwm_static(outputs, ratio):
    appearance, _ = cut(ratio)
    return average_over_masks([[absolute_mean(pair.z_next[appearance] - pair.z[appearance])
                                for pair in pairs_of(outputs, mask)] for mask in outputs.masks])


def naive_fwm_orth(outputs, ratio):
    appearance, dynamics = cut(ratio)
    per_mask = []
    for mask in outputs.masks:
        channels = [torch.cat([clip[:, channel] for clip in mask.z]) for channel in range(CHANNELS)]
        centred = [channel - channel.mean() for channel in channels]
        covariances = [
            (centred[a] * centred[b]).sum() / (len(centred[a]) - 1)
            for a in appearance
            for b in dynamics
        ]
        per_mask.append(average(covariance ** 2 for covariance in covariances))
    return average(per_mask)


def naive_spectrum(steps):
    """The real Fourier transform of a list of vectors in time: [(real part, imaginary part)] by
    frequency."""
    t = len(steps)
    return [
        (
            sum(
                math.cos(2 * math.pi * frequency * time / t) * step
                for time, step in enumerate(steps)
            ),
            sum(
                -math.sin(2 * math.pi * frequency * time / t) * step
                for time, step in enumerate(steps)
            ),
        )
        for frequency in range(t // 2 + 1)
    ]


def naive_spectral(outputs):
    cells, (t, h, w) = cells_of(outputs.grid), outputs.grid
    per_mask = []
    for mask in outputs.masks:
        errors = []
        for clip, tokens in enumerate(mask.visible.tolist()):
            z = {cells[token]: features for token, features in zip(tokens, mask.z[clip])}
            target = dict(zip(cells, outputs.h[clip].detach()))
            for row, column in itertools.product(range(h), range(w)):
                places = [(time, row, column) for time in range(t)]
                if t < 4 or any(place not in z for place in places):
                    continue
                spectra = zip(naive_spectrum([z[place] for place in places]),
                              naive_spectrum([target[place] for place in places]))
                errors.append(
                    average(
                        (
                            (0.1 + 0.9 * frequency / (t // 2))
                            * ((real - real_h) ** 2 + (imaginary - imaginary_h) ** 2).sqrt()
                        ).mean()
                        for frequency, ((real, imaginary), (real_h, imaginary_h)) in enumerate(
                            spectra
                        )
                    )
                )
        per_mask.append(errors)
    return average_over_masks(per_mask)


def cosine(a, b):
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def naive_ltc(outputs, margin):
    zero = torch.zeros((), dtype=torch.float64)
    return average_over_masks(
        [
            [
                torch.maximum(zero, margin - cosine(pair.z, pair.h) + cosine(pair.z, pair.h_next))
                for pair in pairs_of(outputs, mask)
            ]
            for mask in outputs.masks
        ]
    )


def mean_colour(clip, cell):
    """The mean RGB, a vector of 3, of the pixels of one token in a clip [3, T, H, W]."""
    time, row, column = cell
    return clip[
        :,
        time * FRAMES_PER_STEP : (time + 1) * FRAMES_PER_STEP,
        row * PIXEL_ROWS : (row + 1) * PIXEL_ROWS,
        column * PIXEL_COLUMNS : (column + 1) * PIXEL_COLUMNS,
    ].mean((1, 2, 3))


def naive_ac(outputs, head, dynamics_only=False):
    per_mask = []
    for mask in outputs.masks:
        errors = []
        for pair in pairs_of(outputs, mask):
            clip, (time, row, column) = outputs.clips[pair.clip], pair.cell
            target = mean_colour(clip, (time + 1, row, column)) - mean_colour(clip, pair.cell)
            errors.append(absolute_mean(head(seen_by_head(pair.z, dynamics_only)) - target))
        per_mask.append(errors)
    return average_over_masks(per_mask)


def huber(difference, delta=0.1):
    """Huber(difference, 0): quadratic up to delta, then linear."""
    size = difference.abs()
    return torch.where(size <= delta, 0.5 * size ** 2, delta * (size - 0.5 * delta)).mean()


def naive_kinematic(outputs, order=1, penalty=absolute_mean, channels=CHANNELS):
    t, h, w = outputs.grid
    values = []
    for clip in outputs.h:  # with gradient
        steps = {cell: features[:channels] for cell, features in zip(cells_of(outputs.grid), clip)}
        for row, column in itertools.product(range(h), range(w)):
            track = [steps[time, row, column] for time in range(t)]
            if order == 2 and t >= 3:
                values += [
                    penalty(track[i + 1] - 2 * track[i] + track[i - 1]) for i in range(1, t - 1)
                ]
            else:
                values += [penalty(track[i + 1] - track[i]) for i in range(t - 1)]
    return average(values)


def naive_epps_pulley(sample, directions):
    """directions: a list of unit vectors. The trapezoid rule on 17 nodes of [0, 3], doubled."""
    nodes = torch.tensor([3 * i / 16 for i in range(17)], dtype=torch.float64)
    phi = (-nodes ** 2 / 2).exp()
    statistics = []
    for direction in directions:
        angles = (sample @ direction).unsqueeze(1) * nodes
        integrand = phi * ((angles.cos().mean(0) - phi) ** 2 + angles.sin().mean(0) ** 2)
        trapezoids = (integrand[1:] + integrand[:-1]) / 2 * (3 / 16)
        statistics.append(len(sample) * 2 * trapezoids.sum())
    return average(statistics)


def naive_sigreg(outputs, directions):
    """With the global random generator in the same state as for the real one."""
    sample = torch.cat([clip for mask in outputs.masks for clip in mask.z])
    gaussian = torch.randn(CHANNELS, directions, dtype=torch.float64)
    return naive_epps_pulley(
        sample, [column / (column * column).sum().sqrt() for column in gaussian.T]
    )


def naive_hamiltonian(outputs, head, dt):
    def derivatives(q, p):
        energy = head(torch.cat((q, p))).sum()
        return torch.autograd.grad(energy, (q, p), create_graph=True)

    half = CHANNELS // 2
    per_mask = []
    for mask in outputs.masks:
        errors = []
        for pair in pairs_of(outputs, mask):
            q, p = pair.z[:half], pair.z[half:]
            q_later = q + dt * derivatives(q, p)[1]
            p_later = p - dt * derivatives(q_later, p)[0]
            errors.append(
                absolute_mean(q_later - pair.h_next[:half])
                + absolute_mean(p_later - pair.h_next[half:])
            )
        per_mask.append(errors)
    return average_over_masks(per_mask)


def quantile(values, share):
    """Linear interpolation between the two sorted values next to the place share * (n - 1)."""
    values, place = sorted(values), share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def slow_cells(h, grid, percentile):
    """The (time, row, column) of one clip's targets that move no faster than their time step's
    quantile."""
    steps = dict(zip(cells_of(grid), h.detach().tolist()))
    slow = set()
    for time in range(grid[0] - 1):
        speed = {
            (time, row, column): math.dist(steps[time + 1, row, column], steps[time, row, column])
            for row, column in itertools.product(range(grid[1]), range(grid[2]))
        }
        limit = quantile(speed.values(), percentile)
        slow |= {cell for cell, v in speed.items() if v <= limit}
    return slow


def naive_velgate(outputs, percentile):
    slow = [slow_cells(h, outputs.grid, percentile) for h in outputs.h]
    return average_over_masks(
        [
            [
                float(pair.cell in slow[pair.clip]) * absolute_mean(pair.z_next - pair.z)
                for pair in pairs_of(outputs, mask)
            ]
            for mask in outputs.masks
        ]
    )


# --------------------------------------------------------------------- terms against the naive ones


class Case(NamedTuple):
    """A term (or part of the core loss), its options, and the same by plain loops."""
    name: str
    options: dict
    naive: object
    naive_options: dict
    head: tuple = ()  # layer widths; none for terms without a head


def same_options(name, naive, head=(), **options):
    return Case(name, options, naive, options, head)


HALF = CHANNELS // 2
CASES = [
    same_options("prediction", naive_prediction),
    same_options("context", naive_context),
    same_options("hw", naive_hw),
    same_options("delta", naive_delta),
    same_options("ld", naive_ld, head=(CHANNELS, 5, CHANNELS)),
    same_options("ld", naive_ld, head=(HALF, 5, CHANNELS), dynamics_only=True),
    same_options("ld", naive_ld, head=(CHANNELS, 5, CHANNELS), hard=True),
    same_options("ld", naive_ld, head=(HALF, 5, CHANNELS), dynamics_only=True, hard=True),
    Case("fwm_static", {}, naive_fwm_static, {"ratio": 0.5}),
    Case("fwm_orth", {}, naive_fwm_orth, {"ratio": 0.5}),
    same_options("spectral", naive_spectral),
    Case("ltc", {}, naive_ltc, {"margin": 0.5}),
    same_options("ltc", naive_ltc, margin=0.1),
    same_options("ac", naive_ac, head=(CHANNELS, 5, 3)),
    same_options("ac", naive_ac, head=(HALF, 5, 3), dynamics_only=True),
    same_options("kinematic", naive_kinematic),
    Case("kinematic", {"huber": True}, naive_kinematic, {"penalty": huber}),
    same_options("kinematic", naive_kinematic, order=2),
    Case("kinematic", {"order": 2, "split": 0.5}, naive_kinematic, {"order": 2, "channels": 6}),
    Case("kinematic", {"split": 0.3}, naive_kinematic, {"channels": 3}),
    Case("sigreg", {"directions": 20, "chunk": 5}, naive_sigreg, {"directions": 20}),
    same_options("hamiltonian", naive_hamiltonian, head=(CHANNELS, 5, 5, 1), dt=0.7),
    Case("velgate", {}, naive_velgate, {"percentile": 0.5}),
    same_options("velgate", naive_velgate, percentile=0.3),
    same_options("velgate", naive_velgate, percentile=1.0),
]
CORE = {"prediction": prediction_loss, "context": context_loss}
GRIDS = [
    (4, 3, 5),
    (3, 5, 4),
    (5, 2, 3),
    (2, 4, 3),
]  # of 2 steps `kinematic` has no acceleration, of 3 no `spectral`


def gradients(value, leaves):
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


def assert_equals_naive(case, outputs):
    head = [make_head(*case.head)] if case.head else []
    torch.manual_seed(1)
    value = {**TERMS, **CORE}[case.name](outputs, *head, **case.options)
    torch.manual_seed(1)
    expected = case.naive(outputs, *head, **case.naive_options)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    leaves = [outputs.h, *itertools.chain(*((mask.z, mask.p, mask.c) for mask in outputs.masks)),
              *itertools.chain(*(network.parameters() for network in head))]
    # Gradients are about 1e-3. Where those of both masks cancel, `context` leaves 1e-10, since
    # distances are float32.
    torch.testing.assert_close(
        gradients(value, leaves), gradients(expected, leaves), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("grid, batch", [*zip(GRIDS, (1, 3, 1, 2))], ids=str)
def test_values_and_gradients_equal_the_naive_ones(grid, batch):
    outputs = make_outputs(grid, batch)
    for case in CASES:
        assert_equals_naive(case, outputs)


def test_every_term_has_a_naive_counterpart():
    assert set(TERMS) == {case.name for case in CASES} - set(CORE)


def test_records_hold_what_spectral_needs_and_lacks():
    """The comparison above says nothing about `spectral` unless one mask has valid positions and
    another has none."""
    outputs = make_outputs((5, 2, 3), 3, (True, False))
    with_positions, without = (outputs._replace(masks=[mask]) for mask in outputs.masks)
    assert naive_spectral(with_positions) > 0
    assert naive_spectral(without) == 0


PAIR_CASES = [
    case
    for case in CASES
    if case.name in ("delta", "ld", "fwm_static", "spectral", "ltc", "ac", "hamiltonian", "velgate")
]


def test_a_mask_without_valid_positions_is_left_out():
    for empty in (0, 1):
        outputs = make_outputs((5, 2, 3), 2, (empty == 1, empty == 0))
        alone = outputs._replace(masks=[outputs.masks[1 - empty]])
        for case in PAIR_CASES:
            assert_equals_naive(case, outputs)
            assert_equals_naive(case, alone)
            head = [make_head(*case.head)] if case.head else []
            both, one = (TERMS[case.name](masks, *head, **case.options)
                         for masks in (outputs, alone))
            torch.testing.assert_close(both, one)


def test_without_any_valid_position_terms_are_zero_with_finite_gradients():
    outputs = make_outputs((4, 3, 5), 2, (False, False))
    for case in PAIR_CASES:
        head = [make_head(*case.head)] if case.head else []
        value = TERMS[case.name](outputs, *head, **case.options)
        assert value == 0, case.name
        leaves = [mask.z for mask in outputs.masks]
        leaves += [parameter for network in head for parameter in network.parameters()]
        for gradient in gradients(value, leaves):
            assert torch.equal(gradient, torch.zeros_like(gradient)), case.name  # hence not NaN


def test_epps_pulley_equals_the_naive_one():
    generator = torch.Generator().manual_seed(2)
    for count, directions in ((3, 1), (40, 6)):
        sample = 0.5 + torch.randn(count, 7, generator=generator, dtype=torch.float64)
        drawn = torch.randn(directions, 7, generator=generator, dtype=torch.float64)
        unit = [direction / direction.norm() for direction in drawn]
        torch.testing.assert_close(epps_pulley(sample, torch.stack(unit, dim=1), count),
                                   naive_epps_pulley(sample, unit), rtol=1e-6, atol=0)


# -------------------------------------------------------------------------- terms with known values


def replace_z(outputs, function):
    """The outputs with function(visible tokens [B, n], targets there [B, n, 4D]) for z."""
    masks = [
        mask._replace(
            z=function(mask.visible, outputs.h.take_along_dim(mask.visible.unsqueeze(-1), dim=1))
        )
        for mask in outputs.masks
    ]
    return outputs._replace(masks=masks)


def scaled(outputs, factor):
    """The outputs with predictions and targets, and so errors, so many times as large."""
    masks = [mask._replace(p=factor * mask.p) for mask in outputs.masks]
    return outputs._replace(h=factor * outputs.h, masks=masks)


def test_hw_is_the_prediction_loss_for_small_errors_and_that_of_the_worst_tokens_for_large_ones():
    outputs = make_outputs((4, 3, 5), 3)
    small, large = scaled(outputs, 1e-9), scaled(outputs, 1e6)
    torch.testing.assert_close(TERMS["hw"](small), prediction_loss(small), rtol=1e-7, atol=0)
    worst = average(average(max(errors) for errors in masked_errors(large, mask))
                    for mask in large.masks)
    torch.testing.assert_close(TERMS["hw"](large), worst)


def test_features_that_equal_the_targets_have_no_delta_and_no_spectral_error():
    outputs = replace_z(make_outputs((4, 3, 5), 2), lambda tokens, h: h)
    assert TERMS["delta"](outputs) == 0
    assert TERMS["spectral"](outputs) == 0


def test_spectral_counts_a_constant_offset_at_a_tenth():
    """The transform of a constant 2 over 4 steps is 8 at frequency 0 of 3 frequencies, weighted
    0.1."""
    outputs = replace_z(make_outputs((4, 3, 5), 2), lambda tokens, h: h + 2.0)
    assert TERMS["spectral"](outputs).item() == pytest.approx(0.1 * 8 / 3)


def test_fewer_visible_tokens_than_time_steps_have_no_spectrum():
    outputs = make_outputs((4, 3, 5), 2)
    few = [
        mask._replace(visible=mask.visible[:, :3].contiguous(), z=mask.z[:, :3])
        for mask in outputs.masks
    ]
    assert TERMS["spectral"](outputs._replace(masks=few)) == 0
    one_mask_with_few = outputs._replace(masks=[outputs.masks[0], few[1]])
    torch.testing.assert_close(
        TERMS["spectral"](one_mask_with_few), naive_spectral(one_mask_with_few)
    )


def test_uniform_motion_has_a_difference_but_no_acceleration():
    outputs = make_outputs((5, 2, 3), 2)
    velocity = torch.linspace(0.01, 2.0, CHANNELS, dtype=torch.float64)
    time = torch.tensor([cell[0] for cell in cells_of(outputs.grid)]).unsqueeze(-1)
    moving = outputs._replace(h=(time * velocity).expand(2, -1, -1))
    assert TERMS["kinematic"](moving).item() == pytest.approx(velocity.mean().item())
    assert TERMS["kinematic"](moving, order=2).item() == pytest.approx(0, abs=1e-12)


def test_velocity_gate_is_open_everywhere_on_a_still_clip():
    outputs = make_outputs((4, 3, 5), 2)
    still = outputs._replace(h=torch.ones_like(outputs.h))
    z_stands_still = mean_over_pairs(still, lambda at: distance(at.z_next, at.z))
    torch.testing.assert_close(TERMS["velgate"](still), z_stands_still)


def test_sigreg_of_collapsed_features_is_the_integral_and_of_gaussian_ones_near_one_per_direction():
    outputs = make_outputs((4, 3, 5), 3)
    collapsed = replace_z(outputs, lambda tokens, h: torch.zeros_like(h))
    count = sum(mask.visible.numel() for mask in outputs.masks)
    # Integral over [-3, 3] of phi (1 - phi)^2 = phi - 2 phi^2 + phi^3; the 17 nodes err by less
    # than 1e-3 of it.
    integral = sum(sign * math.sqrt(2 * math.pi / power) * math.erf(3 * math.sqrt(power / 2))
                   for power, sign in ((1, 1), (2, -2), (3, 1)))
    assert TERMS["sigreg"](collapsed).item() == pytest.approx(count * integral, rel=1e-3)
    # The expected statistic of n standard normal numbers is the integral of phi (1 - phi^2),
    # whatever n is.
    expected = sum(sign * math.sqrt(2 * math.pi / power) * math.erf(3 * math.sqrt(power / 2))
                   for power, sign in ((1, 1), (3, -1)))
    torch.manual_seed(3)
    samples = [
        TERMS["sigreg"](
            replace_z(outputs, lambda tokens, h: torch.randn_like(h)), directions=64
        ).item()
        for _ in range(60)
    ]
    error = np.std(samples) / math.sqrt(len(samples))
    assert abs(np.mean(samples) - expected) < 4 * error < 0.2


def test_sigreg_draws_fresh_directions_every_step():
    outputs = make_outputs((4, 3, 5), 1)
    torch.manual_seed(4)
    first, second = TERMS["sigreg"](outputs, directions=8), TERMS["sigreg"](outputs, directions=8)
    assert first != second


def test_fwm_orth_stays_in_float32_under_autocast():
    outputs = make_outputs((4, 3, 5), 3)
    masks = [mask._replace(z=mask.z.float()) for mask in outputs.masks]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = TERMS["fwm_orth"](outputs._replace(masks=masks))
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), naive_fwm_orth(outputs, ratio=0.5), rtol=1e-5, atol=0
    )


def test_the_hard_share_is_one_for_equal_errors_and_one_token_of_k_for_one_error_above_all():
    outputs = make_outputs((4, 3, 5), 2)
    masks = [mask._replace(p=take(outputs.h, mask.masked).detach() + 3.0) for mask in outputs.masks]
    assert hard_share(outputs._replace(masks=masks)).item() == pytest.approx(1)
    for mask in masks:
        mask.p[:, 0] += 1e3
    alone = average(1 / mask.masked.shape[1] for mask in masks)
    assert hard_share(outputs._replace(masks=masks)).item() == pytest.approx(alone)


# ----------------------------------------------------------------------------- the named objectives


class Expected(NamedTuple):
    """A row of METHOD.md section 6. terms: (coefficient, name, naive term, its options)."""
    regime: str
    terms: tuple = ()
    masks: tuple = (0.0, 0.0, 1.0)  # strength s, uniform share r, max_temporal_keep
    ema: bool = True


def kinematic_row(coefficient, **options):
    return Expected("ucf101", ((coefficient, "kinematic", naive_kinematic, options),), ema=False)


def hw_row(coefficient):
    return coefficient, "hw", naive_hw, {}


FWM = (
    (0.05, "fwm_static", naive_fwm_static, {"ratio": 0.5}),
    (0.01, "fwm_orth", naive_fwm_orth, {"ratio": 0.5}),
)
DELTA = (0.5, "delta", naive_delta, {})
SIGREG = (1.0, "sigreg", naive_sigreg, {"directions": 1024})
AMG = (5.0, 0.0, 1.0)
EXPECTED = {
    "baseline": Expected("both"),
    "motion_guided": Expected("both", masks=(2.0, 0.1, 1.0)),
    "amg": Expected("mixed", masks=AMG),
    "hw": Expected("mixed", (hw_row(0.3),)),
    "delta": Expected("mixed", (DELTA,)),
    "combo": Expected("mixed", (DELTA, hw_row(0.3)), masks=AMG),
    "fwm": Expected("mixed", FWM),
    "ld": Expected("mixed", ((1.0, "ld", naive_ld, {}),)),
    "fwm_ld": Expected("mixed", (*FWM, (1.0, "ld", naive_ld, {"dynamics_only": True}))),
    "hw_ld": Expected("mixed", (hw_row(1.0), (1.0, "ld", naive_ld, {"hard": True}))),
    "fwm_hw_ld": Expected("mixed", (*FWM, hw_row(1.0), (
        1.0, "ld", naive_ld, {"dynamics_only": True, "hard": True}))),
    "spectral": Expected("mixed", ((1.0, "spectral", naive_spectral, {}),)),
    "ltc": Expected("mixed", ((0.5, "ltc", naive_ltc, {"margin": 0.5}),)),
    "ac": Expected("mixed", ((1.0, "ac", naive_ac, {}),)),
    "ac_hw": Expected("mixed", ((1.0, "ac", naive_ac, {}), hw_row(0.3))),
    "fac": Expected("mixed", (*FWM, (1.0, "ac", naive_ac, {"dynamics_only": True}))),
    "kinematic": kinematic_row(1.0),
    "kinematic_0_1": kinematic_row(0.1),
    "kinematic_huber": kinematic_row(0.1, penalty=huber),
    "kinematic_accel": kinematic_row(0.1, order=2),
    "kinematic_split": kinematic_row(0.1, order=2, channels=6),
    "kinematic_anneal": kinematic_row(0.1, order=2),
    "sigreg": Expected("ucf101", (SIGREG,)),
    "sigreg_no_ema": Expected("ucf101", (SIGREG,), ema=False),
    "hamiltonian": Expected("ucf101", ((1.0, "hamiltonian", naive_hamiltonian, {"dt": 0.1}),)),
    "velgate": Expected("ucf101", ((1.0, "velgate", naive_velgate, {"percentile": 0.5}),)),
    "future_predictive": Expected("ucf101", masks=(0.0, 0.0, 0.5)),
    "motion_future": Expected("ucf101", masks=(2.0, 0.1, 0.5)),
}


def test_the_objectives_are_the_28_released_ones():
    assert set(OBJECTIVES) == set(EXPECTED)
    assert len(EXPECTED) == 28


def test_regimes_masks_and_ema_are_those_of_the_paper():
    for name, expected in EXPECTED.items():
        objective = OBJECTIVES[name]
        assert objective.regime == expected.regime, name
        assert objective.masking == Masking(*expected.masks), name
        assert objective.ema == expected.ema, name


HARD_DYNAMICS = (
    "hw_ld",
    "fwm_hw_ld",
)  # the two whose `ld` term the released code leaves without gradient


def test_totals_are_sums_of_the_naive_terms():
    outputs = make_outputs((4, 2, 3), 2)
    for name in EXPECTED:
        assert_total_is_the_sum(name, OBJECTIVES[name], outputs)
    for name in HARD_DYNAMICS:
        assert_total_is_the_sum(name, released_form(OBJECTIVES[name]), outputs)


def assert_total_is_the_sum(name, objective, outputs):
    torch.manual_seed(5)
    heads = make_heads(objective, LEVEL_WIDTH).double()
    # Three quarters through the run: lambda is 0.25 and the epoch 75.
    weights = coefficients(objective, 22500, 30000)
    torch.manual_seed(6)
    values = losses(outputs, objective, heads, weights)
    torch.manual_seed(6)
    expected = {"pred": naive_prediction(outputs), "ctx": naive_context(outputs)}
    expected_total = expected["pred"] + 0.25 * expected["ctx"]
    for coefficient, term, naive, options in EXPECTED[name].terms:
        if name == "kinematic_anneal":
            coefficient *= 0.5 * (1 + math.cos(math.pi * 75 / 100))
        expected[term] = naive(outputs, *([heads[term]] if term in heads else []), **options)
        expected_total = expected_total + coefficient * expected[term]
    if "hw" in expected:
        torch.testing.assert_close(
            values.pop("hard_share"), naive_hard_share(outputs), rtol=1e-6, atol=0
        )
    assert list(values)[-1] == "total"
    torch.testing.assert_close(values, {**expected, "total": expected_total}, rtol=1e-6, atol=0)


def test_total_uses_the_weights_it_is_given():
    outputs, objective = make_outputs((4, 3, 5), 1), OBJECTIVES["combo"]
    values = losses(outputs, objective, {}, {"pred": 3.0, "ctx": 5.0, "delta": 7.0, "hw": 0.0})
    expected = 3 * naive_prediction(outputs) + 5 * naive_context(outputs) + 7 * naive_delta(outputs)
    torch.testing.assert_close(values["total"], expected, rtol=1e-6, atol=0)


WIDTHS = {  # of the heads
    "ld": {"ld": (12, 256, 12)},
    "fwm_ld": {"ld": (6, 256, 12)},
    "ac": {"ac": (12, 256, 3)},
    "fac": {"ac": (6, 256, 3)},
    "hamiltonian": {"hamiltonian": (12, 256, 256, 1)},
    "combo": {},
}


def test_heads_have_the_widths_of_the_paper():
    for name, widths in WIDTHS.items():
        found = {}
        for term, head in make_heads(OBJECTIVES[name], LEVEL_WIDTH).items():
            between = [nn.Linear, nn.GELU] * (len(head) // 2)
            assert [type(layer) for layer in head] == [*between, nn.Linear]
            found[term] = (head[0].in_features, *(layer.out_features for layer in head[::2]))
        assert found == widths, name


def test_a_head_is_added_by_a_line_of_the_table(monkeypatch):
    monkeypatch.setitem(HEADS, "mine", lambda width_in, channels: nn.Linear(width_in, channels + 1))
    for options, seen in (({}, 12), ({"dynamics_only": True}, 6)):
        objective = replace(
            OBJECTIVES["baseline"], terms={"mine": Term(1.0, options), "delta": Term(1.0)}
        )
        heads = make_heads(objective, LEVEL_WIDTH)
        assert list(heads) == ["mine"] and (
            heads["mine"].in_features,
            heads["mine"].out_features,
        ) == (seen, 13)


def test_the_released_forms_differ_in_nothing_but_their_faults():
    for name, objective in OBJECTIVES.items():
        released = released_form(objective)
        assert objective.evaluated == ("target" if EXPECTED[name].ema else "encoder"), name
        assert released.evaluated == "target", name
        assert (released.regime, released.ema) == (objective.regime, objective.ema), name
        assert released.masking == replace(objective.masking, maxima_mixed_up=True), name
        assert (released.terms == objective.terms) == (name not in HARD_DYNAMICS), name
        for step in (0, 22500):
            assert coefficients(released, step, 30000) == coefficients(objective, step, 30000)


def test_released_hard_dynamics_trains_nothing():
    """Its value is right (the totals above), but neither encoder nor head gets a gradient."""
    outputs = make_outputs((4, 3, 5), 2)
    for name, trains in itertools.product(HARD_DYNAMICS, (True, False)):
        objective = OBJECTIVES[name] if trains else released_form(OBJECTIVES[name])
        heads = make_heads(objective, LEVEL_WIDTH).double()
        values = losses(outputs, objective, heads, coefficients(objective, 0, 30000))
        assert values["ld"].requires_grad == trains
        assert (
            any(gradient.any() for gradient in gradients(values["total"], list(heads.parameters())))
            == trains
        )


SCHEDULE = [(0, 0.0, 0), (300, 0.0, 1), (15000, 0.0, 50), (22500, 0.25, 75), (30000, 0.5, 100)]


def test_coefficients_follow_the_paper_at_the_same_share_of_any_run():
    for (step, context_weight, epoch), steps in itertools.product(SCHEDULE, (30000, 1000)):
        step = step * steps // 30000
        for name, row in EXPECTED.items():
            anneal = 1.0
            if name == "kinematic_anneal":
                anneal = 0.5 * (1 + math.cos(math.pi * epoch / 100))
            expected = {"pred": 1.0, "ctx": context_weight}
            for coefficient, term, *_ in row.terms:
                expected[term] = coefficient * anneal
            found = coefficients(OBJECTIVES[name], step, steps)
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
            without_context = coefficients(OBJECTIVES[name], step, steps, ctx_weight=0.0)
            assert without_context == {**found, "ctx": 0.0}


def test_annealing_goes_by_epochs():
    at = {
        step: coefficients(OBJECTIVES["kinematic_anneal"], step, 30000)["kinematic"]
        for step in (0, 299, 300, 599)
    }
    assert at[0] == at[299] == 0.1
    assert at[300] == at[599] == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi / 100)))


FAULTY = {  # what is wrong with a term, and what the sentence says of it
    "not in the table": (None, None, "'mine' that is not in TERMS: hw, delta, "),
    "no scalar": (lambda outputs: outputs.masks[0].z.mean(-1), None, r"one finite number, not tens"),
    "a number": (lambda outputs: 3.0, None, "a tensor of one finite number, not 3.0$"),
    "nothing": (lambda outputs: None, None, "a tensor of one finite number, not None$"),
    "errors with channels": (
        lambda outputs: mean_over_pairs(outputs, lambda at: (at.z_next - at.z).abs()), None,
        r"its errors have the shape \[2, \d+, 12\] instead of \[2, \d+\]"),
    "no head": (lambda outputs, head: head(outputs.h).mean(), None,
                "called without a head of HEADS, does not work: .* required positional"),
    "a narrow head": (lambda outputs, head: head(outputs.h).mean(), nn.Linear(5, 1).double(),
                      "mat1 and mat2 shapes cannot be multiplied"),
    "a head of one channel": (
        lambda outputs, head: mean_over_pairs(outputs, lambda at: distance(head(at.z), at.z_next)),
        nn.Linear(12, 1).double(), r"it compares \[2, \d+, 1\] with \[2, \d+, 12\]"),
    "not a number": (lambda outputs: outputs.h.mean() * math.nan, None, r"not tensor\(nan"),
    "infinite": (lambda outputs: outputs.h.mean() / 0, None, r"not tensor\(-?inf"),
}


def test_a_faulty_term_is_named_in_one_sentence(monkeypatch):
    outputs = make_outputs((4, 3, 5), 2)
    objective = replace(OBJECTIVES["delta"], terms={"delta": Term(0.5), "mine": Term(1.0)})
    for function, head, sentence in FAULTY.values():
        if function:
            monkeypatch.setitem(TERMS, "mine", function)
        with pytest.raises(ValueError, match=sentence) as raised:
            check_terms(outputs, objective, {"mine": head} if head else {})
        assert "'mine'" in str(raised.value) and "\n" not in str(raised.value)
    for name in ("pred", "ctx", "total", "hard_share"):
        monkeypatch.setitem(TERMS, name, lambda outputs: outputs.h.mean())
        with pytest.raises(ValueError, match=f"'{name}' has the name of a loss"):
            check_terms(outputs, replace(objective, terms={name: Term(1.0)}), {})


def test_the_check_passes_every_objective_and_changes_no_random_number():
    outputs = make_outputs((4, 3, 5), 2)
    for objective in OBJECTIVES.values():
        heads = make_heads(objective, LEVEL_WIDTH).double()
        before = torch.get_rng_state()
        check_terms(outputs, objective, heads)
        assert torch.equal(torch.get_rng_state(), before)


def test_without_predictions_at_visible_tokens_only_the_context_loss_is_missing():
    outputs, objective = make_outputs((4, 3, 5), 2), OBJECTIVES["combo"]
    weights = coefficients(objective, 0, 100)  # lambda is zero
    whole = losses(outputs, objective, {}, weights)
    masks = [mask._replace(c=None) for mask in outputs.masks]
    short = losses(outputs._replace(masks=masks), objective, {}, weights)
    assert whole.pop("ctx") > 0
    assert short == whole


def test_sigreg_weighs_the_same_however_a_step_is_shared():
    """The count of a step's clips goes into the term, whatever part of them a micro-batch holds."""
    outputs, values = make_outputs((4, 3, 5), 2), []
    for groups in (1, 4):
        torch.manual_seed(0)
        values.append(TERMS["sigreg"](outputs._replace(groups=groups), directions=8))
    torch.testing.assert_close(values[1], 4 * values[0])


def test_terms_know_nothing_of_training():
    """A term is a function of the outputs, of its head where it has one, and of options that have
    defaults."""
    for name, term in TERMS.items():
        first, *others = inspect.signature(term).parameters.values()
        required = [parameter.name for parameter in others if parameter.default is parameter.empty]
        assert first.name == "outputs"
        assert required == (["head"] if name in ("ld", "ac", "hamiltonian") else [])


# ------------------------------------------------------------------------------------ sampled masks

MASKINGS = sorted({objective.masking for objective in OBJECTIVES.values()},
                  key=lambda masking: (masking.first_steps, masking.motion_strength))
MASK_GRIDS = [
    (2, 2, 2),
    (4, 3, 5),
    (3, 5, 4),
    (5, 2, 3),
    (2, 7, 7),
    (1, 4, 4),
    (4, 1, 6),
    (8, 14, 14),
    (8, 24, 24),
]


def draw(batch, grid, masking, seed):
    """Both masks of a batch with a random motion map where the masking asks for one."""
    generator, motion = torch.Generator().manual_seed(seed), [None] * batch
    if masking.motion_strength:
        motion = torch.rand(batch, *grid, generator=generator)
    return sample_masks(motion, grid, masking, generator, generator)


def test_masks_are_sorted_disjoint_and_never_empty():
    for grid, masking, batch in itertools.product(MASK_GRIDS, MASKINGS, (1, 4)):
        assert_sound(grid, masking, batch)


def assert_sound(grid, masking, batch):
    masks = draw(batch, grid, masking, seed=0)
    assert len(masks) == 2
    for visible, masked in masks:
        assert visible.shape[0] == masked.shape[0] == batch
        assert visible.shape[1] > 0 and masked.shape[1] > 0
        for tokens in (visible, masked):
            assert (tokens[:, 1:] > tokens[:, :-1]).all()
            assert tokens.min() >= 0 and tokens.max() < math.prod(grid)
        for clip in range(batch):
            assert not set(visible[clip].tolist()) & set(masked[clip].tolist())
        if batch == 1:  # nothing is cut
            assert sorted(visible[0].tolist() + masked[0].tolist()) == list(range(math.prod(grid)))


def test_future_predictive_masks_show_the_first_half_only_and_predict_all_the_rest():
    future = [masking for masking in MASKINGS if masking.first_steps < 1]
    grids = (2, 3, 3), (5, 4, 3), (8, 6, 6)
    for grid, masking, batch in itertools.product(grids, future, (1, 2, 5)):
        for visible, masked in draw(batch, grid, masking, seed=batch):
            for shown, hidden in zip(visible.tolist(), masked.tolist()):
                times = {cells_of(grid)[token][0] for token in shown}
                assert times <= set(range(int(0.5 * grid[0])))
                # None is lost, however clips are cut.
                assert sorted(shown + hidden) == list(range(math.prod(grid)))


def positions_at_start(visible, grid):
    """One clip's visible (row, column) at time 0, from its token ids."""
    return {
        (token // grid[2], token % grid[2])
        for token in visible.tolist()
        if token < grid[1] * grid[2]
    }


def test_batch_is_cut_to_its_smallest_counts_from_the_end():
    grid, cut_of_visible, cut_of_masked = (8, 6, 6), 0, 0
    for seed in range(5):
        for visible, masked in draw(4, grid, Masking(), seed):
            whole_visible, whole_masked = [], []
            for clip in range(4):
                # Blocks span all of the time, so the first step, which no cut reaches here, tells
                # the whole mask.
                shown = positions_at_start(visible[clip], grid)
                assert len(shown) + len(positions_at_start(masked[clip], grid)) == 36
                is_visible = [cell[1:] in shown for cell in cells_of(grid)]
                whole_visible.append(
                    [token for token in range(len(is_visible)) if is_visible[token]]
                )
                whole_masked.append(
                    [token for token in range(len(is_visible)) if not is_visible[token]]
                )
            for tokens, whole in ((visible, whole_visible), (masked, whole_masked)):
                smallest = min(map(len, whole))
                assert tokens.tolist() == [clip[:smallest] for clip in whole]
            cut_of_visible += max(map(len, whole_visible)) - visible.shape[1]
            cut_of_masked += max(map(len, whole_masked)) - masked.shape[1]
    assert cut_of_visible > 0 and cut_of_masked > 0  # otherwise nothing was shown


def test_sizes_come_from_their_own_generator_and_positions_from_the_other():
    """Two micro-batches of a step: blocks of equal sizes at places of their own."""
    grid, generator = (4, 14, 14), lambda seed: torch.Generator().manual_seed(seed)
    masking = Masking(
        first_steps=0.5
    )  # its second mask is one block, so that a mask tells its size
    masks = [sample_masks([None], grid, masking, generator(place), generator(7))[1][1]
             for place in (0, 1, 2, 3, 0)]
    assert (
        len({mask.shape for mask in masks}) == 1
        and len({tuple(mask[0].tolist()) for mask in masks}) > 1
    )
    assert torch.equal(masks[0], masks[-1])
    sizes = {sample_masks([None], grid, masking, generator(0), generator(seed))[1][1].shape
             for seed in range(10)}
    assert len(sizes) > 1


def block_sizes(grid, scale):
    """Every block size (rows, columns) of METHOD.md's formula, with the share of the aspect ratios
    that give it."""
    h, w = grid[1:]
    cells, counts, points = int(h * w * scale), {}, 20000
    for i in range(points):
        aspect = 0.75 + 0.75 * (i + 0.5) / points
        # A grid so small that its block has no whole cell still gets one of 1x1.
        size = (
            min(h, max(1, round(math.sqrt(cells * aspect)))),
            min(w, max(1, round(math.sqrt(cells / aspect)))),
        )
        counts[size] = counts.get(size, 0) + 1
    return {size: count / points for size, count in counts.items()}


def test_block_sizes_follow_the_formula():
    generator = torch.Generator().manual_seed(0)
    grids = (3, 14, 14), (2, 5, 9), (4, 3, 3), (2, 2, 2)
    for grid, share in itertools.product(grids, (0.15, 0.70)):
        allowed, found = block_sizes(grid, share), set()
        for _ in range(300):
            size = draw_block_size(share, grid, generator)
            mask = place_blocks(1, size, grid, Masking(), None, generator)
            rows, columns = mask.any(2).any(0).sum().item(), mask.any(1).any(0).sum().item()
            assert mask.sum() == grid[0] * rows * columns  # a full rectangle, at all times
            found.add((rows, columns))
        assert found <= set(allowed)
        # Missed once in 10,000 runs.
        assert found >= {size for size, likely in allowed.items() if likely > 0.03}


def test_block_counts_and_shares_are_those_of_the_paper():
    assert Masking().kinds == ((8, 0.15), (2, 0.70))
    assert Masking(motion_strength=2.0, uniform_share=0.1).kinds == ((8, 0.15), (2, 0.70))
    assert Masking(first_steps=0.5).kinds == ((4, 0.15), (1, 0.70))


def test_a_mask_is_the_union_of_so_many_blocks():
    generator = torch.Generator().manual_seed(0)
    for blocks in (1, 2, 4, 8):
        masks = [place_blocks(blocks, (1, 1), (1, 20, 20), Masking(), None, generator)
                 for _ in range(40)]
        assert max(mask.sum().item() for mask in masks) == blocks


def test_first_mask_is_short_range_and_second_long_range():
    grid = (8, 14, 14)
    short, long = (
        {rows * columns for rows, columns in block_sizes(grid, scale)} for scale in (0.15, 0.70)
    )
    for seed in range(30):
        (_, masked_short), (_, masked_long) = draw(1, grid, Masking(), seed)
        assert 8 * min(short) <= masked_short.shape[1] <= 8 * 8 * max(short)
        assert 8 * min(long) <= masked_long.shape[1] <= 8 * 2 * max(long)


def test_block_size_is_drawn_once_per_batch_and_its_position_per_clip():
    """With a single block of a common size all clips hide equally many tokens, so that nothing
    needs to be cut."""
    grid, sizes = (4, 14, 14), set()
    for seed in range(10):
        visible, masked = draw(4, grid, Masking(first_steps=0.5), seed)[1]
        assert visible.shape[1] + masked.shape[1] == math.prod(grid)
        assert len({tuple(clip) for clip in masked.tolist()}) > 1
        sizes.add(masked.shape[1])
    assert len(sizes) > 1


def test_equal_seeds_give_equal_masks():
    for masking in MASKINGS:
        first, again, other = ([tokens.tolist() for tokens in itertools.chain(
            *draw(2, (4, 7, 7), masking, seed))] for seed in (0, 0, 1))
        assert first == again != other


def test_a_grid_that_cannot_be_masked_is_refused_with_a_reason():
    reason = r"token grid of \(2, 1, 1\); use a larger crop or smaller patches"
    for masking in MASKINGS:
        with pytest.raises(ValueError, match=reason):
            draw(1, (2, 1, 1), masking, seed=0)


# ---------------------------------------------------------------------------- where the blocks fall

PLACEMENT_GRID, PLACEMENT_SIZE = (2, 4, 5), (2, 3)  # 3 x 3 places for the top left corner
PLACES = list(itertools.product(range(3), range(3)))
DRAWS = 2500


def count_corners(masking, motion, draws, seed=0):
    """How often a single block's top left corner falls on each of PLACES."""
    generator, counts = torch.Generator().manual_seed(seed), dict.fromkeys(PLACES, 0)
    for _ in range(draws):
        mask = place_blocks(1, PLACEMENT_SIZE, PLACEMENT_GRID, masking, motion, generator)
        rows, columns = mask[0].any(1).tolist(), mask[0].any(0).tolist()
        counts[rows.index(True), columns.index(True)] += 1
    return [counts[place] for place in PLACES]


def naive_probabilities(motion, strength, uniform_share):
    t, (rows, columns) = PLACEMENT_GRID[0], PLACEMENT_SIZE
    strengths = []
    for top, left in PLACES:
        under_block = [motion[time, row, column].item() for time in range(t)
                       for row in range(top, top + rows) for column in range(left, left + columns)]
        strengths.append(average(under_block) ** strength)
    return [
        uniform_share / len(PLACES) + (1 - uniform_share) * value / sum(strengths)
        for value in strengths
    ]


def assert_follow(counts, probabilities):
    """Pearson's chi-square stays within four standard deviations of its mean, the degrees of
    freedom."""
    expected = sum(counts) * np.array(probabilities)
    assert expected.min() > 5  # below, the statistic does not follow its distribution
    statistic, freedom = ((np.array(counts) - expected) ** 2 / expected).sum(), len(counts) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_uniform_blocks_fall_anywhere_alike():
    assert_follow(count_corners(Masking(), None, DRAWS), [1 / 9] * 9)


def test_guided_blocks_follow_the_motion_under_them():
    motion = torch.rand(PLACEMENT_GRID, generator=torch.Generator().manual_seed(0))
    motion *= torch.linspace(0.1, 1, 5)
    for strength, uniform_share in ((2.0, 0.1), (5.0, 0.0), (2.0, 0.5), (1.0, 0.0)):
        masking = Masking(motion_strength=strength, uniform_share=uniform_share)
        counts = count_corners(masking, motion, DRAWS)
        assert_follow(counts, naive_probabilities(motion, strength, uniform_share))
        # The test can tell: the same counts do not follow a weaker guidance, nor no guidance.
        for other in (naive_probabilities(motion, 0.5 * strength, uniform_share), [1 / 9] * 9):
            with pytest.raises(AssertionError):
                assert_follow(counts, other)


def test_uniform_share_of_the_blocks_ignores_motion():
    """Only one corner cell moves, and only the block at place (0, 0) covers it."""
    motion = torch.zeros(PLACEMENT_GRID)
    motion[:, 0, 0] = 1
    counts = count_corners(Masking(motion_strength=2.0, uniform_share=0.3), motion, DRAWS)
    assert_follow(counts, [0.7 + 0.3 / 9] + [0.3 / 9] * 8)
    assert (
        count_corners(Masking(motion_strength=5.0, uniform_share=0.0), motion, 100)
        == [100] + [0] * 8
    )


def test_still_clip_is_masked_uniformly():
    still = torch.zeros(PLACEMENT_GRID)
    assert_follow(
        count_corners(Masking(motion_strength=5.0, uniform_share=0.0), still, DRAWS), [1 / 9] * 9
    )


def test_every_clip_is_guided_by_its_own_motion():
    """Without a uniform share each block covers the only cell that moves, so it is never
    visible."""
    grid, moving = (4, 6, 6), [(1, 1), (4, 2), (0, 5)]
    motion = torch.zeros(3, *grid)
    for clip, (row, column) in enumerate(moving):
        motion[clip, :, row, column] = 1
    for masking in (Masking(motion_strength=5.0), Masking(motion_strength=5.0, first_steps=0.5)):
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            for _, masked in sample_masks(motion, grid, masking, generator, generator):
                for clip, (row, column) in enumerate(moving):
                    assert row * grid[2] + column in masked[clip].tolist()


# --------------------------------------------------------------------------------------- motion map


def resize_axis(array, size, axis):
    """Linear interpolation along one axis between cell centres, the border repeated."""
    length, slices = array.shape[axis], []
    for i in range(size):
        place = min(max((i + 0.5) * length / size - 0.5, 0), length - 1)
        below = min(int(place), length - 1)
        above = min(below + 1, length - 1)
        share = place - below
        slices.append((1 - share) * array.take(below, axis) + share * array.take(above, axis))
    return np.stack(slices, axis)


def naive_motion(clip, grid):
    """How much one clip [3, T, H, W] moves, before division: an array [t, h, w]."""
    differences = []
    for time in range(clip.shape[1]):
        earlier = max(time - 1, 0)  # the first frame repeats the first difference
        differences.append(average(abs(colour[earlier + 1] - colour[earlier]) for colour in clip))
    motion = np.stack(differences)
    for axis in range(3):
        motion = resize_axis(motion, grid[axis], axis)
    return motion


def naive_motion_map(clip, grid):
    motion = naive_motion(clip, grid)
    return motion / motion.max() if motion.max() > 0 else motion


def random_clips(batch, shape, dtype=torch.float64):
    return torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_motion_maps_equal_the_naive_ones():
    for shape, grid in (((8, 12, 12), (4, 3, 3)), ((6, 10, 15), (3, 5, 3)), ((5, 7, 6), (2, 3, 4)),
                        ((2, 4, 4), (1, 2, 2)), ((4, 3, 3), (4, 3, 3))):
        clips = random_clips(3, shape)
        clips[1] *= 0.01  # each clip has its own maximum
        motion = motion_map(clips, grid)
        expected = np.stack([naive_motion_map(clip, grid) for clip in clips.numpy()])
        torch.testing.assert_close(motion, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
        assert torch.equal(motion.amax((1, 2, 3)), torch.ones(3, dtype=torch.float64))


def test_the_middle_pixels_of_cells_have_the_same_motion_map():
    for shape, grid, kept in (((8, 32, 32), (4, 4, 4), (8, 8)), ((4, 64, 48), (2, 4, 3), (8, 6)),
                              ((9, 20, 15), (3, 4, 3), (4, 3)), ((4, 14, 6), (2, 7, 6), (14, 6))):
        clips = random_clips(3, shape, torch.float32)
        few = middle_pixels(clips, grid)
        assert few.shape == (3, 3, shape[0], *kept)
        assert torch.equal(motion_map(few, grid), motion_map(clips, grid))


def test_as_released_time_step_k_is_divided_by_the_maximum_of_clip_k():
    for batch in (4, 5, 7):
        clips = random_clips(batch, (8, 12, 12))
        clips *= torch.logspace(-1, 1, batch).view(-1, 1, 1, 1, 1)
        clips[2] = clips[2, :, :1]  # stands still
        moves = [naive_motion(clip, (4, 3, 3)) for clip in clips.numpy()]
        motion = motion_map(clips, (4, 3, 3), maxima_mixed_up=True)
        for i, k in itertools.product(range(batch), range(4)):  # further clips divide nothing
            expected = torch.from_numpy(moves[i][k] / max(moves[k].max(), 1e-6))
            torch.testing.assert_close(motion[i, k], expected, rtol=1e-9, atol=1e-12)
        sentence = "each of 4 time steps .* a micro-batch has 3 clips; give --micro-batch 4"
        with pytest.raises(ValueError, match=sentence):
            motion_map(clips[:3], (4, 3, 3), maxima_mixed_up=True)


def test_still_clip_has_no_motion_and_leaves_its_neighbour_alone():
    clips = torch.randn(2, 3, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    clips[0] = clips[0, :, :1]
    still, moving = motion_map(clips, (4, 3, 3))
    assert torch.equal(still, torch.zeros(4, 3, 3))
    assert torch.equal(moving, motion_map(clips[1:], (4, 3, 3))[0])
    assert moving.max() == 1


def test_the_readme_lists_every_objective_as_it_is():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = re.search(r"\| mixed \| adds .*\n((?:\|.*\n)+)", readme)[1]
    listed = dict(re.findall(r"`(\w+)` \| (.*?) \|", table))
    assert listed == {name: describe_objective(objective) for name, objective in OBJECTIVES.items()}
