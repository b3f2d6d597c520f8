"""What Video JEPA is trained on: masks, the core loss, every auxiliary term, named objectives.

A term is a function of `Outputs` (all that the networks made of one batch) to a scalar, and knows
nothing of training. To add an objective, write one function, name it in `TERMS`, and add one line
to `OBJECTIVES`; if the term trains a small network along with it, a head, add one line to `HEADS`.

Notation of the equations: Z is z at a visible token and Z+ is z one time step later at the same row
and column; H and H+ are the targets at these two places, detached. A "pair" is a visible token
whose next one is visible too. |.| is the absolute value, averaged over channels. The lab report is
tests/results/README.md.
"""
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import LEVELS, normalise, places, take

# ------------------------------------------------------------------------------------------ masks

@dataclass(frozen=True)
class Masking:
    """How an objective draws its two masks."""
    motion_strength: float = 0.0  # s: blocks fall with probability ~ (mean motion under them)^s
    uniform_share: float = 0.0  # r: the share of blocks that is placed uniformly all the same
    first_steps: float = 1.0  # only this first share of the time steps may be visible
    maxima_mixed_up: bool = False  # `motion_map` as released

    @property
    def kinds(self):
        """The short-range and the long-range mask, (number of blocks, share of the frame that a
        block covers) each: many small blocks ask for detail from close by, few large ones for what
        the whole scene implies. Fewer are needed where later time steps are hidden anyway."""
        return ((4, 0.15), (1, 0.70)) if self.first_steps < 1 else ((8, 0.15), (2, 0.70))


def motion_map(clips, grid, maxima_mixed_up=False):
    """How much each cell moves: normalised clips [B, 3, T, H, W] -> [B, t, h, w], at most 1 in each
    clip: the absolute difference of neighbouring frames, averaged over colours (the first frame
    repeats the first difference) and resized trilinearly. A clip that stands still gives 0.
    maxima_mixed_up: time step k of every clip is divided by the maximum of clip k, since the
    released code lets maxima [B, 1, 1] meet maps [B, t, h, w] (lab report, departure 10)."""
    difference = clips.diff(dim=2).abs().mean(1, keepdim=True)
    difference = torch.cat((difference[:, :, :1], difference), dim=2)  # (B, 1, T, H, W)
    motion = F.interpolate(difference, size=grid, mode="trilinear").squeeze(1)  # (B, t, h, w)
    largest = motion.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
    if maxima_mixed_up:
        if len(clips) < grid[0]:
            raise ValueError(f"--as-released divides each of {grid[0]} time steps by the maximum "
                             f"of another clip, but a micro-batch has {len(clips)} clips; give "
                             f"--micro-batch {grid[0]} or more")
        largest = largest[:grid[0]].view(1, -1, 1, 1)
    return motion / largest


def middle_pixels(clips, grid):
    """The middle pixel or two of each cell along rows and columns: clips [B, 3, T, h or 2h, w or
    2w], with the same motion map, 50 times as fast: trilinear resizing looks at no others."""
    for axis, cells in ((3, grid[1]), (4, grid[2])):
        clips = clips.unflatten(axis, (cells, -1))  # a cell's pixels stand in axis + 1
        span = clips.shape[axis + 1]
        clips = clips.narrow(axis + 1, (span - 1) // 2, 2 - span % 2).flatten(axis, axis + 1)
    return clips


def draw_block_size(share, grid, generator):
    """Rows and columns of a block that covers this share of a frame, aspect ratio 0.75 to 1.5."""
    _, h, w = grid
    aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
    cells = int(h * w * share)
    rows, columns = round(math.sqrt(cells * aspect)), round(math.sqrt(cells / aspect))
    return min(h, max(1, rows)), min(w, max(1, columns))


def place_blocks(blocks, size, grid, masking, motion, generator):
    """The mask of one clip: bool [t, h, w], True where masked. A block spans all time steps, since
    a place hidden at one moment only could be copied from the next frame. motion: [t, h, w], or
    None for uniform placement."""
    t, h, w = grid
    rows, columns = size
    weights = torch.zeros(h - rows + 1, w - columns + 1)  # of places for the top left corner
    if motion is not None:  # its mean under a block: over time, then over a sliding window
        means = F.avg_pool2d(motion.mean(0, keepdim=True), size, stride=1)[0]
        weights = means ** masking.motion_strength

    masked = torch.zeros(grid, dtype=torch.bool)
    for _ in range(blocks):  # anywhere where nothing moves
        if weights.any() and torch.rand((), generator=generator).item() >= masking.uniform_share:
            corner = torch.multinomial(weights.flatten(), 1, generator=generator).item()
        else:
            corner = torch.randint(weights.numel(), (), generator=generator).item()
        top, left = divmod(corner, w - columns + 1)
        masked.numpy()[:, top:top + rows, left:left + columns] = True  # faster than torch
    masked[max(1, int(masking.first_steps * t)):] = True
    return masked


def equal_counts(masks):
    """The first token ids at which each clip's mask [N] is True, as many as the clip with the
    fewest has: [B, count], sorted."""
    tokens = [mask.nonzero().squeeze(1) for mask in masks]
    count = min(map(len, tokens))
    return torch.stack([ids[:count] for ids in tokens])


def sample_masks(motion, grid, masking, generator, sizes):
    """Draw both masks of a batch: a list of (visible [B, n], masked [B, k]), sorted token ids.

    One block size per mask for the whole batch, positions per clip. A clip with nothing left to see
    is drawn again; then all clips are cut to the batch's smallest counts, dropping the end of the
    raster order, that is late time steps (lab report, departure 13). Future-predictive masks lose
    no token: what is not visible is predicted. motion: of each clip, as `place_blocks` takes it.
    sizes: a generator of block sizes alone, equal for all micro-batches of a step.
    """
    masks = []
    for blocks, share in masking.kinds:
        size, hidden = draw_block_size(share, grid, sizes), []
        for moves in motion:
            for _ in range(1000):
                mask = place_blocks(blocks, size, grid, masking, moves, generator)
                if not mask.all():
                    break
            else:
                raise ValueError(f"no mask of {blocks} blocks of {size[0]}x{size[1]} tokens leaves "
                                 f"anything visible on a token grid of {grid}; use a larger crop "
                                 "or smaller patches")
            hidden.append(mask.flatten())

        visible = equal_counts([~mask for mask in hidden])  # (B, n)
        if masking.first_steps < 1.0:
            hidden = torch.ones(len(motion), math.prod(grid)).bool().scatter(1, visible, False)
        masks.append((visible, equal_counts(hidden)))  # (B, n), (B, k)
    return masks


def draw_masks(clips, positions, sizes, grid, masking):
    """`sample_masks` for uint8 clips [B, 3, T, H, W], called in a loader's worker, so that no step
    waits for it. positions, sizes: the generators of where blocks lie, and how large they are."""
    motion = [None] * len(clips)
    if masking.motion_strength:
        motion = motion_map(normalise(middle_pixels(clips, grid)), grid, masking.maxima_mixed_up)
    return sample_masks(motion, grid, masking, positions, sizes)


# ----------------------------------------------------------------------- what a term may look at

class MaskOutputs(NamedTuple):
    """One mask of a batch, and what the networks made of it."""
    visible: torch.Tensor  # [B, n] token ids, ascending: `mean_over_pairs` searches them
    masked: torch.Tensor  # [B, k] token ids
    z: torch.Tensor  # [B, n, 4D] encoder features of the visible tokens
    p: torch.Tensor  # [B, k, 4D] predictions at masked tokens
    c: torch.Tensor | None = None  # [B, n, 4D] predictions at visible tokens, where they count


class Outputs(NamedTuple):
    """A batch after the forward passes: all that a term may look at."""
    clips: torch.Tensor  # [B, 3, T, H, W], normalised
    grid: tuple  # (t, h, w)
    h: torch.Tensor  # [B, N, 4D] targets; without EMA they carry gradient
    masks: list  # MaskOutputs of each mask
    groups: int = 1  # micro-batches of a step, over all ranks together


class Pairs(NamedTuple):
    """The visible tokens of one mask, each beside its next time step at the same row and column."""
    z: torch.Tensor  # [B, n, 4D] Z, or the part of its channels that was asked for
    z_next: torch.Tensor  # [B, n, 4D] Z+, likewise
    h: torch.Tensor  # [B, n, 4D] H, detached
    h_next: torch.Tensor  # [B, n, 4D] H+, detached
    tokens: torch.Tensor  # [B, n] ids of the tokens
    next_tokens: torch.Tensor  # [B, n] ids one time step later
    valid: torch.Tensor  # [B, n] is the next one visible? Where it is not, Z+ and H+ mean nothing


def mean_over_masks(errors):
    """Average over masks of the mean error at a mask's valid positions; a mask without any is left
    out. errors: for each mask (error, valid), both [B, n]."""
    total, used = 0.0, 0.0
    for error, valid in errors:
        if error.shape != valid.shape:
            raise ValueError(f"its errors have the shape {list(error.shape)} instead of "
                             f"{list(valid.shape)}; average them over channels")
        count = valid.sum()
        total += (error * valid).sum() / count.clamp(min=1)
        used += (count > 0)
    return total / used.clamp(min=1)


def mean_over_pairs(outputs, error, part=None):
    """Average of error(`Pairs`), [B, n], over each mask's pairs. part: cuts the channels of Z."""
    _, rows, columns = outputs.grid
    h, errors = outputs.h.detach(), []
    for visible, _, z, *_ in outputs.masks:
        z = part(z) if part else z
        wanted = visible + rows * columns
        index = torch.searchsorted(visible, wanted).clamp(max=visible.shape[1] - 1)
        valid = visible.gather(1, index) == wanted  # (B, n)
        later = wanted.clamp(max=h.shape[1] - 1)
        at = Pairs(z, take(z, index), take(h, visible), take(h, later), visible, later, valid)
        errors.append((error(at), valid))
    return mean_over_masks(errors)


def over_channels(x):
    """The mean over channels: [..., C] -> [...]. Backwards, mean() would divide each channel."""
    return x.sum(-1) / x.shape[-1]


def distance(a, b):
    """|a - b|, averaged over channels: [..., C] -> [...]."""
    if a.shape != b.shape:  # broadcast, they would train all the same
        raise ValueError(f"it compares {list(a.shape)} with {list(b.shape)}")
    return over_channels((a - b).abs())


def appearance(z):
    """The first half of the channels, the two shallow levels: [..., 4D] -> [..., 2D]."""
    return z[..., :z.shape[-1] // 2]


def dynamics(z):
    """The second half of the channels, the two deep levels: [..., 4D] -> [..., 2D]."""
    return z[..., z.shape[-1] // 2:]


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SumOverRanks(torch.autograd.Function):
    """The sum over ranks. The loss of every rank depends on it, so its gradient sums over ranks."""

    @staticmethod
    def forward(ctx, value):
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient)


def mean_over_ranks(value):
    """Average over the processes of a distributed run, with gradient."""
    if not dist.is_initialized():
        return value
    return SumOverRanks.apply(value) / dist.get_world_size()


# -------------------------------------------------------------------------------------- core loss

def masked_errors(outputs):
    """|p - h[masked]| of each mask, [B, k, 4D]."""
    return [(mask.p - take(outputs.h, mask.masked)).abs() for mask in outputs.masks]


def prediction_loss(outputs):
    """L_pred = mean over masks of mean |p - h[masked]|: L1, since the square would chase the few
    tokens that cannot be predicted and pull towards their mean."""
    errors = masked_errors(outputs)
    return sum(e.sum() / e.numel() for e in errors) / len(errors)


def context_loss(outputs):
    """L_ctx = mean over masks of mean(|c - h[visible]| / sqrt(distance to the nearest masked token
    of the clip, in grid units))."""
    total = 0.0
    for mask in outputs.masks:
        visible, masked = (torch.stack(places(tokens, outputs.grid), dim=-1).float()
                           for tokens in (mask.visible, mask.masked))  # (B, n, 3), (B, k, 3)
        # The matrix-product shortcut of cdist would round the squares of small whole numbers.
        apart = torch.cdist(visible, masked, compute_mode="donot_use_mm_for_euclid_dist")
        error = distance(mask.c, take(outputs.h, mask.visible))  # (B, n)
        total += (error / apart.amin(-1).sqrt()).mean()
    return total / len(outputs.masks)


# -------------------------------------------------------------------------------- auxiliary terms

def hard_weights(error):
    """K softmax(error) over the last of the axes [..., K], without gradient; their mean is 1."""
    return error.shape[-1] * error.detach().softmax(-1)


def hard_weighting(outputs):
    """Hard-region weighting: mean(w e), e = |p - h[masked]|, w = k softmax(e) over a clip's k
    tokens, without gradient. With e of order 1 the weights stay close to uniform."""
    errors = [over_channels(e) for e in masked_errors(outputs)]
    return sum((hard_weights(e) * e).mean() for e in errors) / len(errors)


@torch.no_grad()
def hard_share(outputs):
    """Uniformity of the weights of `hard_weighting`, 1 at most: effective sample size / k =
    (sum w)^2 / (k sum w^2)."""
    weights = [hard_weights(over_channels(e)) for e in masked_errors(outputs)]
    return sum((w.mean(1).square() / w.square().mean(1)).mean() for w in weights) / len(weights)


def change_matching(outputs):
    """Change matching: mean |(Z+ - Z) - (H+ - H)| over pairs."""
    return mean_over_pairs(outputs, lambda at: distance(at.z_next - at.z, at.h_next - at.h))


def latent_dynamics(outputs, head, dynamics_only=False, hard=False, detached=False):
    """Latent dynamics: mean |d(Z) - (H+ - H)| over pairs, d a small head. dynamics_only: d sees the
    deep levels alone. hard: each pair weighs n_pairs softmax(error) over all pairs of the batch,
    without gradient. detached: nor has the mean any, as released (lab report, departure 1)."""
    def error(at):
        e = distance(head(at.z), at.h_next - at.h)  # (B, n)
        if hard:
            score = e.detach().masked_fill(~at.valid, torch.finfo(e.dtype).min)
            e = e * at.valid.sum() * score.flatten().softmax(0).view_as(e)
        return e.detach() if detached else e
    return mean_over_pairs(outputs, error, dynamics if dynamics_only else None)


def static_appearance(outputs):
    """Factorised world model, first half: mean |A+ - A| over pairs, A the shallow levels of Z.
    Alone it collapses: a constant encoder makes it zero, and with targets that follow it the core
    loss falls as well. Only a term that asks for change, such as ld, holds against it."""
    return mean_over_pairs(outputs, lambda at: distance(at.z_next, at.z), appearance)


def uncorrelated_factors(outputs):
    """Factorised world model, second half: mean(C^2), C = A^T Dyn / (M - 1), A and Dyn the shallow
    and the deep levels of all M = B n visible tokens of the batch, centred; in float32. A constant
    encoder makes this zero, too."""
    total = 0.0
    for mask in outputs.masks:
        with torch.autocast(mask.z.device.type, enabled=False):
            z = at_least_float32(mask.z).flatten(0, 1)  # (B*n, 4D)
            z = z - z.mean(0)
            total += (appearance(z).T @ dynamics(z) / (len(z) - 1)).square().mean()  # of (2D, 2D)
    return total / len(outputs.masks)


def temporal_spectrum(outputs):
    """Temporal spectrum: mean |w (FFT(Z) - FFT(H))| at places visible at each of t >= 4 time steps.
    Real FFT over time, |.| the complex magnitude; w rises linearly from 0.1 at frequency 0 to 1."""
    t, rows, columns = outputs.grid
    cells = rows * columns

    def errors(mask):
        tokens = mask.visible.unsqueeze(-1).expand_as(mask.z)
        z = torch.zeros_like(outputs.h, dtype=mask.z.dtype).scatter(1, tokens, mask.z)
        difference = at_least_float32(z - outputs.h.detach())  # (B, N, 4D)
        magnitude = torch.fft.rfft(difference.unflatten(1, (t, cells)), dim=1).abs()
        weight = torch.linspace(0.1, 1, t // 2 + 1, device=z.device, dtype=magnitude.dtype)
        steps_seen = F.one_hot(mask.visible % cells, cells).sum(1)  # (B, cells)
        return (weight.view(-1, 1, 1) * magnitude).mean((1, 3)), (steps_seen == t) & (t >= 4)
    return mean_over_masks(map(errors, outputs.masks))


def latent_temporal_contrast(outputs, margin=0.5):
    """Latent temporal contrast: mean max(0, margin - cos(Z, H) + cos(Z, H+)) over pairs."""
    cos = F.cosine_similarity
    return mean_over_pairs(outputs, lambda at: (
        margin - (cos(at.z, at.h, dim=-1) - cos(at.z, at.h_next, dim=-1))).clamp(min=0))


def action_conditioned(outputs, head, dynamics_only=False):
    """Action-conditioned: mean |a(Z) - (rgb+ - rgb)| over pairs, a a small head, rgb the mean
    colour of a token in the input clip. dynamics_only: a sees the deep levels alone (with fwm; the
    paper's "fac")."""
    cell = [pixels // tokens for pixels, tokens in zip(outputs.clips.shape[2:], outputs.grid)]
    rgb = F.avg_pool3d(outputs.clips, cell).flatten(2).transpose(1, 2)  # (B, N, 3)

    def error(at):
        return distance(head(at.z), take(rgb, at.next_tokens) - take(rgb, at.tokens))
    return mean_over_pairs(outputs, error, dynamics if dynamics_only else None)


def kinematic(outputs, order=1, huber=False, split=1.0):
    """Smooth targets: mean |H+ - H| over the full grid, here with gradient: it trains the targets.
    order 2: mean |H[t+1] - 2 H[t] + H[t-1]| (order 1 where there are fewer than 3 steps). huber:
    Huber(H+ - H, 0) with delta 0.1. split: only the first int(split 4D) channels."""
    t, h, w = outputs.grid
    steps = outputs.h.unflatten(1, (t, h * w))  # (B, t, h*w, 4D)
    steps = steps[..., :int(split * steps.shape[-1])]
    difference = steps.diff(n=order if t >= 3 else 1, dim=1)
    if huber:
        return F.huber_loss(difference, torch.zeros_like(difference), delta=0.1)
    return difference.abs().mean()


def epps_pulley(sample, directions, count):
    """How far from standard normal are projections of a sample [n, C] on unit directions [C, m]?
    Mean over directions of count * integral over [-3, 3] of phi(t) ((mean cos(t s) - phi(t))^2 +
    (mean sin(t s))^2) dt, phi(t) = exp(-t^2 / 2), by the trapezoid rule on 17 nodes of [0, 3],
    doubled (LeJEPA, arXiv 2511.08544). The means are those of all ranks."""
    nodes = torch.linspace(0, 3, 17, device=sample.device, dtype=sample.dtype).view(-1, 1)
    phi = torch.exp(-nodes ** 2 / 2)  # (17, 1)
    angles = nodes.unsqueeze(-1) * (sample @ directions)  # (17, n, m)
    waves = torch.stack((angles.cos().mean(1), angles.sin().mean(1)))
    cos, sin = mean_over_ranks(waves)  # (17, m) each
    integrand = phi * ((cos - phi).square() + sin.square())
    return (count * 2 * torch.trapezoid(integrand, nodes, dim=0)).mean()


def sigreg(outputs, directions=1024, chunk=64):
    """Sketched isotropic Gaussian regularisation: `epps_pulley` of the visible tokens of both masks
    on random unit directions, drawn afresh each time, equal on all ranks. Its count is that of all
    micro-batches of a step on all ranks, so that the term weighs the same on one GPU as on four;
    the statistic inside spans the ranks' present ones, as in the paper. Directions go in chunks
    that the backward pass computes again, so that memory does not grow with their number."""
    with torch.autocast(outputs.h.device.type, enabled=False):
        sample = at_least_float32(torch.cat([mask.z.flatten(0, 1) for mask in outputs.masks]))
        unit = torch.randn(sample.shape[1], directions, device=sample.device, dtype=sample.dtype)
        chunks = F.normalize(unit, dim=0).split(chunk, dim=1)
        statistics = [checkpoint(epps_pulley, sample, each, len(sample) * outputs.groups,
                                 use_reentrant=False) for each in chunks]
        return sum(statistics) / len(chunks)


def energy_gradient(head, q, p):
    """dE/dq and dE/dp [B, n, 2D] of the energy network at (q, p), themselves differentiable."""
    # autograd.grad would break a compiled graph; with B and n apart, every n would compile anew.
    x = torch.cat((q, p), dim=-1).flatten(0, 1)  # (B n, 4D)
    gradient = torch.func.grad(lambda x: head(x).sum())(x)
    return gradient.view(*q.shape[:2], -1).chunk(2, dim=-1)


def hamiltonian(outputs, head, dt=0.1):
    """Hamiltonian flow: mean |q' - q of H+| + mean |p' - p of H+| over pairs, from one step of
    symplectic Euler: Z = (q, p) in halves, E an energy network, q' = q + dt dE/dp(q, p), then
    p' = p - dt dE/dq(q', p). The gradient of the loss runs through both derivatives."""
    def error(at):
        q, p = at.z.chunk(2, dim=-1)  # (B, n, 2D) each
        q_next, p_next = at.h_next.chunk(2, dim=-1)
        q = q + dt * energy_gradient(head, q, p)[1]
        p = p - dt * energy_gradient(head, q, p)[0]
        return distance(q, q_next) + distance(p, p_next)
    return mean_over_pairs(outputs, error)


def velocity_gate(outputs, percentile=0.5):
    """Velocity gate, what moves slowly stands still: mean of gate |Z+ - Z| over pairs, gate = 1
    where v = ||H+ - H|| is at most its quantile among the cells of that clip and time step, else 0.
    """
    t, h, w = outputs.grid
    steps = at_least_float32(outputs.h.detach()).unflatten(1, (t, h * w))  # (B, t, h*w, 4D)
    v = steps.diff(dim=1).norm(dim=-1)  # (B, t-1, h*w)
    slow = v <= v.quantile(percentile, dim=-1, keepdim=True)
    gate = F.pad(slow.flatten(1), (0, h * w))  # (B, N); no pair begins at the last time step
    return mean_over_pairs(
        outputs, lambda at: gate.gather(1, at.tokens) * distance(at.z_next, at.z))


# These run outside the compiled graph: torch 2.8 fails to compile rfft and quantile.
NOT_COMPILED = ("spectral", "velgate")
TERMS = {
    "hw": hard_weighting, "delta": change_matching, "ld": latent_dynamics,
    "fwm_static": static_appearance, "fwm_orth": uncorrelated_factors,
    "spectral": temporal_spectrum, "ltc": latent_temporal_contrast, "ac": action_conditioned,
    "kinematic": kinematic, "sigreg": sigreg, "hamiltonian": hamiltonian, "velgate": velocity_gate,
}


def mlp(*widths):
    """Linear layers from each width to the next, GELU between them."""
    layers = []
    for wide, narrow in zip(widths, widths[1:]):
        layers += [nn.GELU(), nn.Linear(wide, narrow)]
    return nn.Sequential(*layers[1:])


HEADS = {  # width_in: what goes in, all 4D channels or those of the deep levels; channels: 4D
    "ld": lambda width_in, channels: mlp(width_in, 256, channels),
    "ac": lambda width_in, channels: mlp(width_in, 256, 3),
    "hamiltonian": lambda width_in, channels: mlp(width_in, 256, 256, 1),
}


def make_heads(objective, width):
    """The heads of an objective's terms: a ModuleDict by term name. width: D."""
    channels, heads = LEVELS * width, nn.ModuleDict()
    for name, term in objective.terms.items():
        if name in HEADS:
            width_in = channels // 2 if "dynamics_only" in term.options else channels
            heads[name] = HEADS[name](width_in, channels)
    return heads


# ----------------------------------------------------------------------------- the named objectives

@dataclass(frozen=True)
class Term:
    """One auxiliary term of an objective: its coefficient, and options of its function."""
    coefficient: float
    options: dict = field(default_factory=dict)
    anneal: bool = False  # the coefficient falls to zero by a half cosine over the run


@dataclass(frozen=True)
class Objective:
    """What is added to the core loss, how masks are drawn, where targets come from."""
    regime: str  # the paper's training data: "mixed", "ucf101" or "both"
    about: str
    terms: dict = field(default_factory=dict)
    masking: Masking = Masking()
    ema: bool = True  # False: targets come from the encoder itself, with gradient
    stale_target: bool = False  # evaluate the target even where nothing updates it, as released

    @property
    def evaluated(self):
        """The network that is probed: "encoder" where without EMA the target never learns."""
        return "target" if self.ema or self.stale_target else "encoder"


def released_form(objective):
    """The same objective as the released code computes and evaluates it (lab report, departures 1,
    2 and 10; of 11 it is data.py that draws masks alike)."""
    terms = dict(objective.terms)
    for name, term in terms.items():
        if "hard" in term.options:
            terms[name] = replace(term, options={**term.options, "detached": True})
    masking = replace(objective.masking, maxima_mixed_up=True)
    return replace(objective, terms=terms, masking=masking, stale_target=True)


FWM = {"fwm_static": Term(0.05), "fwm_orth": Term(0.01)}
GUIDED = Masking(motion_strength=2.0, uniform_share=0.1)
STRONGLY_GUIDED = Masking(motion_strength=5.0)
DEEP, HARD = {"dynamics_only": True}, {"hard": True}

mixed, ucf101 = partial(Objective, "mixed"), partial(Objective, "ucf101")
no_ema = partial(ucf101, ema=False)

OBJECTIVES = {
    "baseline": Objective("both", "the core loss alone"),
    "motion_guided": Objective("both", "masks fall where things move", masking=GUIDED),
    "amg": mixed("masks fall almost only where things move most", masking=STRONGLY_GUIDED),
    "hw": mixed("badly predicted tokens count more", {"hw": Term(0.3)}),
    "delta": mixed("features change over time as targets do", {"delta": Term(0.5)}),
    "combo": mixed("delta + hw + amg", {"delta": Term(0.5), "hw": Term(0.3)}, STRONGLY_GUIDED),
    "fwm": mixed("shallow levels stand still and are uncorrelated with deep ones", FWM),
    "ld": mixed("a head predicts how targets change", {"ld": Term(1.0)}),
    "fwm_ld": mixed("fwm + ld from the deep levels", {**FWM, "ld": Term(1.0, DEEP)}),
    "hw_ld": mixed("hw + ld, both weighted by error", {"hw": Term(1.0), "ld": Term(1.0, HARD)}),
    "fwm_hw_ld": mixed("fwm + hw + ld: the paper's headline method",
                       {**FWM, "hw": Term(1.0), "ld": Term(1.0, {**DEEP, **HARD})}),
    "spectral": mixed("the temporal spectrum of features is that of targets",
                      {"spectral": Term(1.0)}),
    "ltc": mixed("features resemble their own time step more than the next", {"ltc": Term(0.5)}),
    "ac": mixed("a head predicts how colours change", {"ac": Term(1.0)}),
    "ac_hw": mixed("ac + hw", {"ac": Term(1.0), "hw": Term(0.3)}),
    "fac": mixed("fwm + ac from the deep levels", {**FWM, "ac": Term(1.0, DEEP)}),
    "kinematic": no_ema("targets change little", {"kinematic": Term(1.0)}),
    "kinematic_0_1": no_ema("kinematic at a tenth", {"kinematic": Term(0.1)}),
    "kinematic_huber": no_ema("by a Huber loss", {"kinematic": Term(0.1, {"huber": True})}),
    "kinematic_accel": no_ema("targets accelerate little", {"kinematic": Term(0.1, {"order": 2})}),
    "kinematic_split": no_ema("shallow targets accelerate little",
                              {"kinematic": Term(0.1, {"order": 2, "split": 0.5})}),
    "kinematic_anneal": no_ema("kinematic_accel, fading out over the run",
                               {"kinematic": Term(0.1, {"order": 2}, anneal=True)}),
    "sigreg": ucf101("features follow an isotropic Gaussian", {"sigreg": Term(1.0)}),
    "sigreg_no_ema": no_ema("sigreg, targets from the encoder itself", {"sigreg": Term(1.0)}),
    "hamiltonian": ucf101("an energy network moves features in time", {"hamiltonian": Term(1.0)}),
    "velgate": ucf101("features of slow cells stand still", {"velgate": Term(1.0)}),
    "future_predictive": ucf101("only the first half of the time steps is visible",
                                masking=Masking(first_steps=0.5)),
    "motion_future": ucf101("future_predictive with masks where things move",
                            masking=replace(GUIDED, first_steps=0.5)),
}


def describe(objective):
    """An objective as one line of text."""
    added, parts, masking = [], [], objective.masking
    for name, term in objective.terms.items():
        options = [f"{key} {value}".removesuffix(" True") for key, value in term.options.items()]
        if term.anneal:
            options.append("annealed")
        added.append(f"{term.coefficient:g} {name} ({', '.join(options)})".removesuffix(" ()"))
    if added:
        parts.append(" + ".join(added))
    if masking.motion_strength:
        s, r = masking.motion_strength, masking.uniform_share
        parts.append(f"motion-guided masks s={s:g} r={r:g}")
    if masking.first_steps < 1:
        parts.append(f"future-predictive masks {masking.first_steps:g}")
    if not objective.ema:
        parts.append("no EMA")
    return "; ".join(parts) or "-"


def objective_list():
    """The named objectives, a line each: name, regime, what it adds, in words."""
    return "\n".join(f"{name:<19}{each.regime:<8}{describe(each):<69}{each.about}"
                     for name, each in OBJECTIVES.items())


# -------------------------------------------------------------------------------- losses of a step

EPOCHS = 100  # the paper's run is 100 epochs of 300 steps; a run of any length has 100 epochs here


def coefficients(objective, step, steps, ctx_weight=0.5):
    """What each loss counts for at a step (from 0) of a run of so many steps: a dict by loss name.
    The context loss counts nothing for the first half of the run, then rises linearly to ctx_weight
    at its end: visible tokens are easy to copy, and what is masked should be learned first."""
    anneal = 0.5 * (1 + math.cos(math.pi * (EPOCHS * step // steps) / EPOCHS))
    weights = {"pred": 1.0, "ctx": ctx_weight * max(0.0, 2 * step / steps - 1)}
    for name, term in objective.terms.items():
        weights[name] = term.coefficient * (anneal if term.anneal else 1.0)
    return weights


def term_value(name, outputs, objective, heads):
    """The value of one term of an objective, unweighted."""
    head = [heads[name]] if name in heads else []
    return TERMS[name](outputs, *head, **objective.terms[name].options)


def losses(outputs, objective, heads, weights):
    """Every loss of an objective by name, unweighted, their weighted sum "total", and with hw
    `hard_share`. There is no "ctx" where nothing was predicted at visible tokens."""
    values = {"pred": prediction_loss(outputs)}
    if outputs.masks[0].c is not None:
        values["ctx"] = context_loss(outputs)
    for name in objective.terms:
        values[name] = term_value(name, outputs, objective, heads)
    values["total"] = sum(weights[name] * value for name, value in values.items())
    if "hw" in objective.terms:
        values["hard_share"] = hard_share(outputs)
    return values


def check_terms(outputs, objective, heads):
    """Try every term on a first batch, leaving the random numbers alone. ValueError, in a sentence
    that names the term, where one does not work."""
    for name in objective.terms:
        if name in ("pred", "ctx", "total", "hard_share"):
            raise ValueError(f"the term {name!r} has the name of a loss that is there already")
        if name not in TERMS:
            raise ValueError(f"the objective has a term {name!r} that is not in TERMS: "
                             + ", ".join(TERMS))
        try:
            with torch.random.fork_rng():
                value = term_value(name, outputs, objective, heads)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            what, how = " ".join(str(error).split()), "with" if name in heads else "without"
            raise ValueError(f"the term {name!r}, called {how} a head of HEADS, does not work: "
                             + what) from error
        if not torch.is_tensor(value) or value.dim() or not value.isfinite():
            given = " ".join(str(value).split())
            raise ValueError(f"the term {name!r} should give a tensor of one finite number, not "
                             f"{given:.60}")
