"""What Video JEPA is trained on: masks, the core loss, every auxiliary term, and the table of named objectives.

A term is a function of `Outputs` (all that the networks made of one batch) to a scalar, and knows nothing of training.
To add an objective, write one function, name it in `TERMS`, and add one line to `OBJECTIVES`; if the term has a small
network of its own to train, a head, add one line to `HEADS`.

Notation of the equations: Z is z at a visible token and Z+ is z one time step later at the same row and column; H and
H+ are the detached targets at these two places. A "pair" is a visible token whose next one is visible too. |.| is the
absolute value, averaged over channels. Shapes are named in model.py.
"""
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import LEVELS, normalise, take

# ---------------------------------------------------------------------------------------------------------- masks


class MaskKind(NamedTuple):
    """One way to hide blocks. `scale` is the share of the frame that a block covers; it spans all time steps."""
    blocks: int
    scale: float


@dataclass(frozen=True)
class Masking:
    """How an objective draws its two masks."""
    motion_strength: float = 0.0  # s: a block falls with probability proportional to (mean motion under it)^s
    uniform_share: float = 0.0  # r: the share of blocks that is placed uniformly all the same
    first_steps: float = 1.0  # the first share of time steps may be visible, the rest is predicted (future-predictive)
    maxima_mixed_up: bool = False  # `motion_map` as released
    random_cut: bool = False  # clips are cut to equal counts at random (`--ablate cut`)

    @property
    def kinds(self):
        """The short-range and the long-range mask; fewer blocks where later time steps are hidden anyway."""
        fewer = self.first_steps < 1.0
        return MaskKind(4 if fewer else 8, 0.15), MaskKind(1 if fewer else 2, 0.70)


def motion_map(clips, grid, maxima_mixed_up=False):
    """How much each grid cell moves: normalised clips [B, 3, T, H, W] -> [B, t, h, w], each clip's maximum 1.

    The absolute difference of neighbouring frames, averaged over colours (the first frame repeats the first difference)
    and resized trilinearly. A clip that stands still gives zeros. maxima_mixed_up: time step k of every clip is divided
    by the maximum of clip k (README, departure 10: maxima [B, 1, 1] meet maps [B, t, h, w]); ValueError where B < t.
    """
    difference = (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean(1, keepdim=True)  # (B, 1, T-1, H, W)
    difference = torch.cat((difference[:, :, :1], difference), dim=2)  # (B, 1, T, H, W)
    motion = F.interpolate(difference, size=grid, mode="trilinear").squeeze(1)  # (B, t, h, w)
    largest = motion.amax((1, 2, 3), keepdim=True)
    if not maxima_mixed_up:
        return torch.where(largest > 0, motion / largest, 0.0)
    if len(clips) < grid[0]:
        raise ValueError(f"--as-released divides each of {grid[0]} time steps by the maximum of another clip, but a "
                         f"micro-batch has {len(clips)} clips; give --micro-batch {grid[0]} or more")
    return motion / largest[:grid[0]].clamp(min=1e-6).view(1, -1, 1, 1)


def middle_pixels(clips, grid):
    """All that `motion_map` looks at, the middle pixel or two of a cell along each axis, at a small share of the cost:
    clips [B, 3, T, H, W] -> [B, 3, T, h or 2h, w or 2w], with the same motion map."""
    for axis, cells in ((3, grid[1]), (4, grid[2])):
        clips = clips.unflatten(axis, (cells, -1))  # a cell's pixels stand in axis + 1
        span = clips.shape[axis + 1]
        clips = clips.narrow(axis + 1, (span - 1) // 2, 2 - span % 2).flatten(axis, axis + 1)
    return clips


def draw_block_size(kind, grid, generator):
    """Draw the rows and columns of a block: the kind's share of the frame, at an aspect ratio from 0.75 to 1.5."""
    _, h, w = grid
    aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
    cells = int(h * w * kind.scale)
    return min(h, max(1, round(math.sqrt(cells * aspect)))), min(w, max(1, round(math.sqrt(cells / aspect))))


def place_blocks(kind, size, grid, masking, motion, generator):
    """The mask of one clip: bool [t, h, w], True where masked. motion: [t, h, w], or None for uniform placement."""
    t, h, w = grid
    rows, columns = size
    corners = (h - rows + 1, w - columns + 1)  # places for the top left corner
    guided = False
    if motion is not None:
        # Blocks span all time steps, so the mean under a block is the mean over time of a sliding window.
        mean_under_block = F.avg_pool2d(motion.mean(0, keepdim=True), size, stride=1).flatten()
        weights = mean_under_block ** masking.motion_strength
        guided = weights.sum() > 0  # else nothing moves in this clip
    masked = torch.zeros(grid, dtype=torch.bool)
    for _ in range(kind.blocks):
        if not guided or torch.rand((), generator=generator).item() < masking.uniform_share:
            corner = torch.randint(corners[0] * corners[1], (), generator=generator).item()
        else:
            corner = torch.multinomial(weights, 1, generator=generator).item()
        top, left = divmod(corner, corners[1])
        masked[:, top:top + rows, left:left + columns] = True
    if masking.first_steps < 1.0:
        masked[max(1, int(masking.first_steps * t)):] = True
    return masked


def equal_counts(masks, generator=None):
    """The token ids at which each clip's mask [N] is True, as many as the clip with the fewest has: [B, count], sorted.
    The first ones are kept or, with a generator, random ones."""
    tokens = [mask.nonzero().squeeze(1) for mask in masks]
    if generator is not None:
        tokens = [ids[torch.randperm(len(ids), generator=generator)] for ids in tokens]
    count = min(map(len, tokens))
    return torch.stack([ids[:count].sort().values for ids in tokens])


def sample_masks(batch, grid, masking, generator, motion=None, sizes=None):
    """Draw both masks of a batch: a list of (visible [B, n], masked [B, k]), sorted token ids.

    One block size per mask for the whole batch, positions per clip. A clip with nothing left to see is drawn again;
    then all clips are cut to the batch's smallest counts, dropping the end of the raster order, that is late time steps
    (README, departure 13). Future-predictive masks lose none: what is not visible is predicted. sizes: a generator of
    block sizes alone, equal for all micro-batches of a step. Raises ValueError where the grid is too small for blocks.
    """
    masks = []
    at_random = torch.Generator().manual_seed(generator.initial_seed() + 1) if masking.random_cut else None
    for kind in masking.kinds:
        size, hidden = draw_block_size(kind, grid, sizes or generator), []
        for i in range(batch):
            for _ in range(1000):
                mask = place_blocks(kind, size, grid, masking, None if motion is None else motion[i], generator)
                if not mask.all():
                    break
            else:
                raise ValueError(f"no mask of {kind.blocks} blocks of {size[0]}x{size[1]} tokens leaves anything "
                                 f"visible on a token grid of {grid}; use a larger crop or smaller patches")
            hidden.append(mask.flatten())
        visible = equal_counts([~mask for mask in hidden], at_random)  # (B, n)
        if masking.first_steps < 1.0:
            hidden = torch.ones(batch, math.prod(grid), dtype=torch.bool).scatter(1, visible, False)
        masks.append((visible, equal_counts(hidden, at_random)))  # (B, n), (B, k)
    return masks


def draw_masks(clips, positions, sizes, grid, masking):
    """`sample_masks` for uint8 clips [B, 3, T, H, W], called in a loader's worker, so that no step waits for it.
    positions, sizes: the generators of where blocks lie, and how large they are."""
    motion = None
    if masking.motion_strength:
        motion = motion_map(normalise(middle_pixels(clips, grid)), grid, masking.maxima_mixed_up)
    return sample_masks(len(clips), grid, masking, positions, motion, sizes)


# ---------------------------------------------------------------------------------------- what a term may look at


class MaskOutputs(NamedTuple):
    """One mask of a batch, and what the networks made of it."""
    visible: torch.Tensor  # [B, n] token ids, ascending: `find_pairs` searches them
    masked: torch.Tensor  # [B, k] token ids
    z: torch.Tensor  # [B, n, 4D] encoder features of the visible tokens
    p: torch.Tensor  # [B, k, 4D] predictions at masked tokens
    c: torch.Tensor  # [B, n, 4D] predictions at visible tokens


class Outputs(NamedTuple):
    """A batch after the forward passes: all that a term may look at."""
    clips: torch.Tensor  # [B, 3, T, H, W], normalised
    grid: tuple  # (t, h, w)
    h: torch.Tensor  # [B, N, 4D] targets; without EMA they carry gradient, so most terms detach them
    masks: list  # MaskOutputs of each mask


class SumOverRanks(torch.autograd.Function):
    """The sum over ranks. Every rank's loss depends on it, so its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, value):
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient)


def rank_count():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value):
    """Average over the processes of a distributed run, with gradient; the value itself in a run of one."""
    return SumOverRanks.apply(value) / rank_count() if rank_count() > 1 else value


def mean_over_masks(outputs, errors):
    """Average over masks of the mean error at a mask's valid positions; a mask without any is left out, and without
    any mask it is zero. errors(mask) -> (error, valid), both [B, n] (`spectral`: [B, places])."""
    total, used = 0.0, 0.0
    for mask in outputs.masks:
        error, valid = errors(mask)
        count = valid.sum()
        total = total + (error * valid).sum() / count.clamp(min=1)
        used = used + (count > 0)
    return total / used.clamp(min=1)


def find_pairs(visible, grid):
    """Where each visible token's next time step stands among the visible ones, and whether it is there: (index [B, n],
    is_pair [B, n]). Where is_pair is False the index points at some other token."""
    wanted = visible + grid[1] * grid[2]
    index = torch.searchsorted(visible, wanted).clamp(max=visible.shape[1] - 1)
    return index, visible.gather(1, index) == wanted


def now_and_next(values, tokens, grid):
    """values [B, N, C] at token ids [B, n], and one time step later at the same place, which means nothing after the
    last time step: [B, n, C] each. Of the detached targets these are H and H+."""
    later = (tokens + grid[1] * grid[2]).clamp(max=math.prod(grid) - 1)
    return take(values, tokens), take(values, later)


def appearance_and_dynamics(z, ratio=0.5):
    """Cut the channels in two: [..., 4D] -> appearance [..., int(ratio 4D)] and dynamics, all the others. At ratio 0.5
    that is the two shallow and the two deep levels: it separates depths, not channels of one depth."""
    cut = int(ratio * z.shape[-1])
    return z[..., :cut], z[..., cut:]


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------ core loss


def deviation(predicted, target, squared=False):
    """|predicted - target|, or its square (collapse laboratory)."""
    difference = predicted - target
    return difference.square() if squared else difference.abs()


def prediction_loss(outputs, squared=False):
    """L_pred = mean over masks of mean |p - h[masked]|."""
    errors = [deviation(mask.p, take(outputs.h, mask.masked), squared).mean() for mask in outputs.masks]
    return sum(errors) / len(errors)


def distance_to_masked(visible, masked, grid):
    """Distance in grid units from each visible token [B, n] to the clip's nearest masked one [B, k]: [B, n]."""
    _, h, w = grid
    places = [torch.stack((tokens // (h * w), tokens // w % h, tokens % w), dim=-1).float()
              for tokens in (visible, masked)]
    # The matrix-product shortcut of cdist would round the squares of small whole numbers.
    return torch.cdist(*places, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)


def context_loss(outputs, squared=False):
    """L_ctx = mean over masks of mean(|c - h[visible]| / sqrt(distance to the nearest masked token))."""
    total = 0.0
    for mask in outputs.masks:
        distance = distance_to_masked(mask.visible, mask.masked, outputs.grid)  # (B, n)
        error = deviation(mask.c, take(outputs.h, mask.visible), squared).mean(-1)  # (B, n)
        total = total + (error / distance.sqrt()).mean()
    return total / len(outputs.masks)


# ------------------------------------------------------------------------------------------------ auxiliary terms


def hard_weights(outputs, temperature):
    """w and e of `hard_weighting` for each mask: a list of (w, e), [B, k] each; the mean of w is 1."""
    errors = [(mask.p - take(outputs.h, mask.masked)).abs().mean(-1) for mask in outputs.masks]
    return [(e.shape[1] * torch.softmax(e.detach() / temperature, dim=1), e) for e in errors]


def hard_weighting(outputs, temperature=1.0):
    """Hard-region weighting: mean(w e), e = |p - h[masked]|, w = k softmax(e / temperature) over the clip's k tokens,
    without gradient. With e of order 1 and temperature 1 the weights stay close to uniform."""
    return sum((w * e).mean() for w, e in hard_weights(outputs, temperature)) / len(outputs.masks)


@torch.no_grad()
def hard_share(outputs, temperature=1.0):
    """Uniformity of the weights of `hard_weighting`, 1 at most: effective sample size / k = (sum w)^2 / (k sum w^2)."""
    shares = [(w.mean(1).square() / w.square().mean(1)).mean() for w, _ in hard_weights(outputs, temperature)]
    return sum(shares) / len(shares)


def change_matching(outputs):
    """Change matching: mean |(Z+ - Z) - (H+ - H)| over pairs."""
    def errors(mask):
        index, is_pair = find_pairs(mask.visible, outputs.grid)
        now, then = now_and_next(outputs.h.detach(), mask.visible, outputs.grid)  # (B, n, 4D) each
        return (take(mask.z, index) - mask.z - (then - now)).abs().mean(-1), is_pair
    return mean_over_masks(outputs, errors)


def latent_dynamics(outputs, head, dynamics_only=False, hard=False, temperature=1.0, detached=False):
    """Latent dynamics: mean |d(Z) - (H+ - H)| over pairs, d a small head.

    dynamics_only: d sees the dynamics channels only (with fwm). hard: each pair weighs n_pairs softmax(error /
    temperature) over all pairs of the batch, without gradient (with hw). detached: the hard-weighted mean has none
    either, so the term trains nothing, as in the released code (README, departure 1).
    """
    def errors(mask):
        _, is_pair = find_pairs(mask.visible, outputs.grid)
        seen = appearance_and_dynamics(mask.z)[1] if dynamics_only else mask.z
        now, then = now_and_next(outputs.h.detach(), mask.visible, outputs.grid)  # (B, n, 4D) each
        error = (head(seen) - (then - now)).abs().mean(-1)  # (B, n)
        if hard:
            # Weights of mean 1 over a mask's pairs, so that `mean_over_masks` still takes an average.
            score = (error.detach() / temperature).masked_fill(~is_pair, torch.finfo(error.dtype).min)
            error = error * is_pair.sum() * torch.softmax(score.flatten(), dim=0).view_as(score)
            if detached:
                error = error.detach()
        return error, is_pair
    return mean_over_masks(outputs, errors)


def static_appearance(outputs, ratio=0.5):
    """Factorised world model, first half: mean |A+ - A| over pairs, A the appearance channels of Z."""
    def errors(mask):
        index, is_pair = find_pairs(mask.visible, outputs.grid)
        appearance, _ = appearance_and_dynamics(mask.z, ratio)
        return (take(appearance, index) - appearance).abs().mean(-1), is_pair
    return mean_over_masks(outputs, errors)


def uncorrelated_factors(outputs, ratio=0.5):
    """Factorised world model, second half: mean(C^2), C = A^T Dyn / (n - 1), A and Dyn of all n visible tokens of the
    batch, centred; in float32."""
    total = 0.0
    for mask in outputs.masks:
        with torch.autocast(mask.z.device.type, enabled=False):
            z = at_least_float32(mask.z).flatten(0, 1)  # (B*n, 4D)
            appearance, dynamics = appearance_and_dynamics(z - z.mean(0), ratio)
            covariance = appearance.T @ dynamics / (len(z) - 1)
            total = total + covariance.square().mean()
    return total / len(outputs.masks)


def temporal_spectrum(outputs):
    """Temporal spectrum: mean |w (FFT(Z) - FFT(H))| at positions visible at every one of t >= 4 time steps.

    Real FFT over time; w rises linearly from 0.1 at the constant frequency to 1.0; |.| is the complex magnitude.
    """
    t, h, w = outputs.grid

    def errors(mask):
        everywhere = torch.arange(t * h * w, device=mask.visible.device).expand(len(mask.visible), -1).contiguous()
        index = torch.searchsorted(mask.visible, everywhere).clamp(max=mask.visible.shape[1] - 1)  # (B, N)
        found = (mask.visible.gather(1, index) == everywhere).view(-1, t, h * w).all(1)  # (B, h*w)
        # Counting them would make the host wait for the GPU. There cannot be more than m = n / t, rounded up: take that
        # many places, and `held` tells which of them are really visible throughout.
        held, place = found.int().topk((mask.visible.shape[1] + t - 1) // t)  # (B, m) each
        index = index.view(-1, t, h * w).gather(2, place.unsqueeze(1).expand(-1, t, -1)).flatten(1)  # (B, t*m)
        difference = take(at_least_float32(mask.z - take(outputs.h.detach(), mask.visible)), index)  # (B, t*m, 4D)
        difference = difference.unflatten(1, (t, place.shape[1]))  # (B, t, m, 4D)
        # The transform by its definition, since a compiled step with torch.fft.rfft fails: the compiler is wrong about
        # where its results lie in memory.
        frequency, time = (torch.arange(n, device=difference.device, dtype=difference.dtype) for n in (t // 2 + 1, t))
        angle = 2 * math.pi / t * frequency.outer(time)  # (t//2+1, t)
        waves = torch.stack((angle.cos(), angle.sin()))  # (2, t//2+1, t)
        with torch.autocast(difference.device.type, enabled=False):
            spectrum = torch.einsum("pft,btmc->pbfmc", waves, difference)  # (2, B, t//2+1, m, 4D), real and imaginary
        weight = torch.linspace(0.1, 1.0, len(frequency), device=difference.device, dtype=difference.dtype)
        magnitude = weight.view(1, -1, 1, 1) * torch.linalg.vector_norm(spectrum, dim=0)
        return magnitude.mean((1, 3)), held.bool() & (t >= 4)
    return mean_over_masks(outputs, errors)


def latent_temporal_contrast(outputs, margin=0.5):
    """Latent temporal contrast: mean max(0, margin - cos(Z, H) + cos(Z, H+)) over pairs."""
    def errors(mask):
        _, is_pair = find_pairs(mask.visible, outputs.grid)
        now, then = now_and_next(outputs.h.detach(), mask.visible, outputs.grid)  # (B, n, 4D) each
        closeness = F.cosine_similarity(mask.z, now, dim=-1) - F.cosine_similarity(mask.z, then, dim=-1)  # (B, n)
        return (margin - closeness).clamp(min=0), is_pair
    return mean_over_masks(outputs, errors)


def action_conditioned(outputs, head, dynamics_only=False):
    """Action-conditioned: mean |a(Z) - (rgb+ - rgb)| over pairs, rgb the mean colour of a token in the input clip.

    dynamics_only: the head a sees the dynamics channels only (with fwm; the study's "fac").
    """
    cell = [pixels // tokens for pixels, tokens in zip(outputs.clips.shape[2:], outputs.grid)]
    rgb = F.avg_pool3d(outputs.clips, cell).flatten(2).transpose(1, 2)  # (B, N, 3)

    def errors(mask):
        _, is_pair = find_pairs(mask.visible, outputs.grid)
        now, then = now_and_next(rgb, mask.visible, outputs.grid)  # (B, n, 3) each
        seen = appearance_and_dynamics(mask.z)[1] if dynamics_only else mask.z
        return (head(seen) - (then - now)).abs().mean(-1), is_pair
    return mean_over_masks(outputs, errors)


def kinematic(outputs, order=1, huber=False, split=1.0):
    """Smooth targets: mean |H+ - H| over the full grid, here with gradient: the target side is what it trains.

    order 2: mean |H[t+1] - 2 H[t] + H[t-1]| (order 1 where there are fewer than 3 steps). huber: Huber(H+ - H, 0) with
    delta 0.1. split: only the first int(split 4D) channels.
    """
    t, h, w = outputs.grid
    channels = int(split * outputs.h.shape[-1])
    steps = outputs.h.unflatten(1, (t, h * w))[..., :channels]  # (B, t, h*w, channels)
    difference = steps.diff(n=order if t >= 3 else 1, dim=1)
    if huber:
        return F.huber_loss(difference, torch.zeros_like(difference), delta=0.1)
    return difference.abs().mean()


def epps_pulley(sample, directions):
    """How far from standard normal the projections of a sample [n, C] on unit directions [C, m] are.

    Mean over directions of n * integral over [-3, 3] of phi(t) ((mean cos(t s) - phi(t))^2 + (mean sin(t s))^2) dt,
    phi(t) = exp(-t^2 / 2), by the trapezoid rule on 17 nodes of [0, 3], doubled (LeJEPA, arXiv 2511.08544).
    """
    nodes = torch.linspace(0, 3, 17, device=sample.device, dtype=sample.dtype).view(-1, 1)
    phi = torch.exp(-nodes ** 2 / 2)  # (17, 1)
    angles = nodes.unsqueeze(-1) * (sample @ directions)  # (17, n, m)
    cos, sin = mean_over_ranks(torch.stack((angles.cos().mean(1), angles.sin().mean(1))))  # (17, m) each
    integrand = phi * ((cos - phi).square() + sin.square())
    return (len(sample) * rank_count() * 2 * torch.trapezoid(integrand, nodes, dim=0)).mean()


def sigreg(outputs, directions=1024, chunk=64):
    """Sketched isotropic Gaussian regularisation: `epps_pulley` of all visible tokens of both masks.

    Random unit directions, fresh each time, equal on all ranks: the one statistic that spans ranks, as in the study.
    They go through in chunks that the backward pass computes again, so that memory does not grow with their number.
    """
    with torch.autocast(outputs.h.device.type, enabled=False):
        sample = at_least_float32(torch.cat([mask.z.flatten(0, 1) for mask in outputs.masks]))  # (n, 4D)
        unit = F.normalize(torch.randn(sample.shape[1], directions, device=sample.device, dtype=sample.dtype), dim=0)
        parts = [checkpoint(epps_pulley, sample, part, use_reentrant=False) * part.shape[1]
                 for part in unit.split(chunk, dim=1)]
        return sum(parts) / directions


def energy_gradient(head, q, p):
    """dE/dq and dE/dp [B, n, 2D] of the energy network at (q, p), themselves differentiable."""
    # torch.autograd.grad would break the graph of a compiled step; with B and n apart, every n would compile anew.
    x = torch.cat((q, p), dim=-1).flatten(0, 1)  # (B n, 4D)
    gradient = torch.func.grad(lambda x: head(x).sum())(x)
    return gradient.view(*q.shape[:2], -1).chunk(2, dim=-1)


def hamiltonian(outputs, head, dt=0.1):
    """Hamiltonian flow: mean |q' - q of H+| + mean |p' - p of H+| over pairs, from one step of symplectic Euler.

    Z = (q, p) in halves, E an energy network: q' = q + dt dE/dp(q, p), then p' = p - dt dE/dq(q', p). The gradient of
    the loss runs through both derivatives.
    """
    def errors(mask):
        q, p = mask.z.chunk(2, dim=-1)  # (B, n, 2D) each
        _, is_pair = find_pairs(mask.visible, outputs.grid)
        _, then = now_and_next(outputs.h.detach(), mask.visible, outputs.grid)  # (B, n, 4D)
        q_target, p_target = then.chunk(2, dim=-1)
        q = q + dt * energy_gradient(head, q, p)[1]
        p = p - dt * energy_gradient(head, q, p)[0]
        return (q - q_target).abs().mean(-1) + (p - p_target).abs().mean(-1), is_pair
    return mean_over_masks(outputs, errors)


def velocity_gate(outputs, percentile=0.5):
    """Velocity gate, what moves slowly stands still: mean of gate |Z+ - Z| over pairs, gate = 1 where v = ||H+ - H|| is
    at most its quantile among the cells of that clip and time step, else 0."""
    t, h, w = outputs.grid
    steps = at_least_float32(outputs.h.detach()).unflatten(1, (t, h * w))
    v = steps.diff(dim=1).norm(dim=-1)  # (B, t-1, h*w)
    # Not v.quantile: at that, torch 2.11 breaks the compiled graph of the step.
    place, ordered = percentile * (h * w - 1), v.sort(dim=-1).values
    limit = torch.lerp(ordered[..., math.floor(place)], ordered[..., math.ceil(place)], place - math.floor(place))
    gate = (v <= limit.unsqueeze(-1)).flatten(1)  # (B, (t-1)*h*w)

    def errors(mask):
        index, is_pair = find_pairs(mask.visible, outputs.grid)
        slow = gate.gather(1, mask.visible.clamp(max=gate.shape[1] - 1))  # the last time step holds no pair
        return (take(mask.z, index) - mask.z).abs().mean(-1) * slow, is_pair
    return mean_over_masks(outputs, errors)


TERMS = {
    "hw": hard_weighting, "delta": change_matching, "ld": latent_dynamics, "fwm_static": static_appearance,
    "fwm_orth": uncorrelated_factors, "spectral": temporal_spectrum, "ltc": latent_temporal_contrast,
    "ac": action_conditioned, "kinematic": kinematic, "sigreg": sigreg, "hamiltonian": hamiltonian,
    "velgate": velocity_gate,
}


def mlp(*widths):
    """Linear layers from each width to the next, GELU between them."""
    layers = [layer for pair in zip(widths, widths[1:]) for layer in (nn.GELU(), nn.Linear(*pair))]
    return nn.Sequential(*layers[1:])


# The heads: small networks of a term's own, trained along with it. `seen` channels go in: all 4D, or the dynamics.
HEADS = {
    "ld": lambda seen, channels: mlp(seen, 256, channels),
    "ac": lambda seen, channels: mlp(seen, 256, 3),
    "hamiltonian": lambda seen, channels: mlp(channels, 256, 256, 1),
}


def make_heads(objective, width):
    """The heads of an objective's terms: a ModuleDict by term name. width: D."""
    channels, heads = LEVELS * width, nn.ModuleDict()
    for name, term in objective.terms.items():
        if name in HEADS:
            seen = channels - int(0.5 * channels) if term.options.get("dynamics_only") else channels
            heads[name] = HEADS[name](seen, channels)
    return heads


# --------------------------------------------------------------------------------------------- the named objectives


@dataclass(frozen=True)
class Term:
    """One auxiliary term of an objective: its coefficient, and options of its function."""
    coefficient: float
    options: dict = field(default_factory=dict)
    anneal: bool = False  # the coefficient falls to zero by a half cosine over the run


@dataclass(frozen=True)
class Objective:
    """One line of the study: what is added to the core loss, how masks are drawn, where targets come from."""
    regime: str  # the study's training data: "mixed", "ucf101" or "both"
    about: str
    terms: dict = field(default_factory=dict)
    masking: Masking = Masking()
    ema: bool = True  # False: targets come from the encoder itself, with gradient
    level_norm: bool = True  # targets are level-normalised
    squared: bool = False  # the core loss squares its errors
    stale_target: bool = False  # evaluate the target even where nothing updates it, as the released code does

    @property
    def evaluated(self):
        """Which network the probes look at: "target", or "encoder" where without EMA the target never learns."""
        return "target" if self.ema or self.stale_target else "encoder"


def released_form(objective):
    """The same objective as the released code computes and evaluates it (README, departures 1, 2
    and 10; of 11 it is data.py that draws masks alike)."""
    terms = {name: replace(term, options={**term.options, "detached": True}) if term.options.get("hard") else term
             for name, term in objective.terms.items()}
    masking = replace(objective.masking, maxima_mixed_up=objective.masking.motion_strength > 0)
    return replace(objective, terms=terms, masking=masking, stale_target=True)


ABLATIONS = ("stop_gradient", "predictor", "level_norm", "l1", "cut")


def without(objective, ingredient):
    """The collapse laboratory: an objective without one of the ABLATIONS. Raises ValueError where it has none.

    "predictor" takes away its blocks, so that no prediction at a masked place depends on what is visible: train.py.
    """
    if ingredient == "cut" and objective.masking.first_steps < 1.0:
        raise ValueError("--ablate cut needs masks that are cut; those of this objective lose no token")
    return replace(objective, **{
        "stop_gradient": {"ema": False}, "level_norm": {"level_norm": False}, "l1": {"squared": True}, "predictor": {},
        "cut": {"masking": replace(objective.masking, random_cut=True)}}[ingredient])


FWM = {"fwm_static": Term(0.05), "fwm_orth": Term(0.01)}
GUIDED = Masking(motion_strength=2.0, uniform_share=0.1)
STRONGLY_GUIDED = Masking(motion_strength=5.0, uniform_share=0.0)

OBJECTIVES = {
    "baseline": Objective("both", "the core loss alone"),
    "motion_guided": Objective("both", "masks fall where things move", masking=GUIDED),
    "amg": Objective("mixed", "masks fall almost only where things move most", masking=STRONGLY_GUIDED),
    "hw": Objective("mixed", "badly predicted tokens count more", {"hw": Term(0.3)}),
    "delta": Objective("mixed", "features change over time as targets do", {"delta": Term(0.5)}),
    "combo": Objective("mixed", "delta + hw + amg", {"delta": Term(0.5), "hw": Term(0.3)}, STRONGLY_GUIDED),
    "fwm": Objective("mixed", "shallow levels stand still and are uncorrelated with deep ones", FWM),
    "ld": Objective("mixed", "a head predicts how targets change", {"ld": Term(1.0)}),
    "fwm_ld": Objective("mixed", "fwm + ld from the deep levels", {**FWM, "ld": Term(1.0, {"dynamics_only": True})}),
    "hw_ld": Objective("mixed", "hw + ld, both weighted by error", {"hw": Term(1.0), "ld": Term(1.0, {"hard": True})}),
    "fwm_hw_ld": Objective("mixed", "fwm + hw + ld: the study's headline method", {
        **FWM, "hw": Term(1.0), "ld": Term(1.0, {"dynamics_only": True, "hard": True})}),
    "spectral": Objective("mixed", "the temporal spectrum of features is that of targets", {"spectral": Term(1.0)}),
    "ltc": Objective("mixed", "features resemble their own time step more than the next", {"ltc": Term(0.5)}),
    "ac": Objective("mixed", "a head predicts how colours change", {"ac": Term(1.0)}),
    "ac_hw": Objective("mixed", "ac + hw", {"ac": Term(1.0), "hw": Term(0.3)}),
    "fac": Objective("mixed", "fwm + ac from the deep levels", {**FWM, "ac": Term(1.0, {"dynamics_only": True})}),
    "kinematic": Objective("ucf101", "targets change little", {"kinematic": Term(1.0)}, ema=False),
    "kinematic_0_1": Objective("ucf101", "kinematic at a tenth", {"kinematic": Term(0.1)}, ema=False),
    "kinematic_huber": Objective("ucf101", "by a Huber loss", {"kinematic": Term(0.1, {"huber": True})}, ema=False),
    "kinematic_accel": Objective("ucf101", "targets accelerate little",
                                 {"kinematic": Term(0.1, {"order": 2})}, ema=False),
    "kinematic_split": Objective("ucf101", "shallow targets accelerate little",
                                 {"kinematic": Term(0.1, {"order": 2, "split": 0.5})}, ema=False),
    "kinematic_anneal": Objective("ucf101", "kinematic_accel, fading out over the run",
                                  {"kinematic": Term(0.1, {"order": 2}, anneal=True)}, ema=False),
    "sigreg": Objective("ucf101", "features follow an isotropic Gaussian", {"sigreg": Term(1.0)}),
    "sigreg_no_ema": Objective("ucf101", "sigreg, targets from the encoder itself", {"sigreg": Term(1.0)}, ema=False),
    "hamiltonian": Objective("ucf101", "an energy network moves features in time", {"hamiltonian": Term(1.0)}),
    "velgate": Objective("ucf101", "features of slow cells stand still", {"velgate": Term(1.0)}),
    "future_predictive": Objective("ucf101", "only the first half of the time steps is visible",
                                   masking=Masking(first_steps=0.5)),
    "motion_future": Objective("ucf101", "future_predictive with masks where things move",
                               masking=replace(GUIDED, first_steps=0.5)),
}


def describe(objective):
    """What an objective adds to the core loss, how it masks and where its targets come from, as one line of text."""
    terms, masking = [], objective.masking
    for name, term in objective.terms.items():
        options = [option if value is True else f"{option} {value}" for option, value in term.options.items()]
        options += ["annealed"] * term.anneal
        terms.append(f"{term.coefficient:g} {name}" + f" ({', '.join(options)})" * bool(options))
    parts = {" + ".join(terms): terms,
             f"motion-guided masks s={masking.motion_strength:g} r={masking.uniform_share:g}": masking.motion_strength,
             f"future-predictive masks {masking.first_steps:g}": masking.first_steps < 1, "no EMA": not objective.ema}
    return "; ".join(part for part, holds in parts.items() if holds) or "-"


def objective_list():
    """The named objectives, a line each: name, regime, what it adds, in words."""
    rows = [(name, objective.regime, describe(objective), objective.about) for name, objective in OBJECTIVES.items()]
    widths = [max(map(len, column)) for column in zip(*rows)][:3] + [0]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) for row in rows)


# ------------------------------------------------------------------------------------------------- losses of a step

EPOCHS = 100  # the study's run is 100 epochs of 300 steps; a run of any length has 100 epochs here


def coefficients(objective, step, steps, ctx_weight=0.5):
    """What each loss counts for at a step (from 0) of a run of so many steps: a dict by loss name.

    The context loss counts nothing for the first half of the run, then rises linearly to ctx_weight at its end.
    """
    anneal = 0.5 * (1 + math.cos(math.pi * (EPOCHS * step // steps) / EPOCHS))
    return {"pred": 1.0, "ctx": ctx_weight * min(1.0, max(0.0, 2 * step / steps - 1)),
            **{name: term.coefficient * (anneal if term.anneal else 1.0) for name, term in objective.terms.items()}}


def losses(outputs, objective, heads, weights):
    """Every loss of an objective by name, unweighted, then their weighted sum, "total", and with hw `hard_share`."""
    values = {"pred": prediction_loss(outputs, objective.squared), "ctx": context_loss(outputs, objective.squared)}
    for name, term in objective.terms.items():
        head = [heads[name]] if name in heads else []
        values[name] = TERMS[name](outputs, *head, **term.options)
    values["total"] = sum(weights[name] * value for name, value in values.items())
    if "hw" in objective.terms:
        values["hard_share"] = hard_share(outputs, **objective.terms["hw"].options)
    return values
