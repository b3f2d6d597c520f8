"""How much faster the training step is than the same step written plainly: a command, not a test.

    python tests/plain_step.py                    ViT-B, 16 frames of 112 px, batch 4, float32, on the CPU
    python tests/plain_step.py --compile yes      the same with our step compiled, which takes one or two minutes first

Plainly is how such code is usually found: masked tokens picked by boolean masks, features scattered back onto the full
grid for the terms in time, rotary angles worked out again in every block with sliced channels, activations thrown away
and computed again in the backward pass, parameters averaged one by one. It is timed with torch's fused attention, and
with attention by its mathematics, as `train.py --benchmark` has it. All steps work on the same networks, and their
losses must agree before anything is timed. They take turns with the same masks, and the median of the rounds' ratios
counts. What could be reached at most is what a step would take that consisted of nothing but the matrix products that
it cannot do without.
"""
import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train
from model import level_normalise
from objectives import coefficients


WARMUP_TURNS = 3  # by then the compiler has seen that token counts change


def plain_rotate(x, position, head_dim):
    """Turn x [B, heads, n, head_dim] by positions [B, n, 3], axis by axis, channel slices side by side."""
    axis_channels, parts, start = 2 * ((head_dim // 3) // 2), [], 0
    for axis in range(3):
        part = x[..., start:start + axis_channels]
        frequency = 10000 ** (-torch.arange(axis_channels // 2) / (axis_channels / 2))
        angle = (position[..., axis, None] * frequency)[:, None]
        even, odd = part[..., 0::2], part[..., 1::2]
        parts.append(torch.stack((even * angle.cos() - odd * angle.sin(),
                                  even * angle.sin() + odd * angle.cos()), dim=-1).flatten(-2))
        start += axis_channels
    return torch.cat((*parts, x[..., start:]), dim=-1)


def plain_block(block, x, tokens, grid):
    _, h, w = grid
    position = torch.stack((tokens // (h * w), tokens // w % h * 15 / (h - 1), tokens % w * 15 / (w - 1)), dim=-1)
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x)).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (q, k, v))
    q, k = (plain_rotate(part, position.float(), part.shape[-1]) for part in (q, k))
    x = x + attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def plain_encoder(encoder, clips, visible, grid):
    """visible: boolean [B, N]."""
    kernel = (encoder.tubelet, encoder.patch, encoder.patch)
    x = F.conv3d(clips, encoder.embed.weight.unflatten(1, (3, *kernel)), encoder.embed.bias, stride=kernel)
    x = x.flatten(2).transpose(1, 2) + encoder.video
    x = x[visible].view(len(clips), -1, x.shape[-1])
    tokens = torch.arange(visible.shape[1]).expand_as(visible)[visible].view(len(clips), -1)
    levels = []
    for i, block in enumerate(encoder.blocks):
        x = checkpoint(plain_block, block, x, tokens, grid, use_reentrant=False)
        if i in encoder.levels:
            levels.append(encoder.norms[len(levels)](x))
    return torch.cat(levels, dim=-1)


def plain_predictor(predictor, z, visible, masked, grid):
    x = torch.cat((predictor.embed(z), predictor.mask_token.expand(*masked.shape, -1)), dim=1) + predictor.video
    tokens = torch.cat((visible, masked), dim=1)
    for block in predictor.blocks:
        x = checkpoint(plain_block, block, x, tokens, grid, use_reentrant=False)
    x = predictor.norm(x)
    return predictor.to_masked(x[:, visible.shape[1]:]), predictor.to_visible(x[:, :visible.shape[1]])


def on_grid(values, tokens, grid):
    """Scatter [B, n, C] onto the full grid, zeros elsewhere: [B, t, h * w, C], and which cells hold something."""
    t, h, w = grid
    full = torch.zeros(len(values), t * h * w, values.shape[-1])
    full = full.scatter(1, tokens[..., None].expand_as(values), values)
    held = torch.zeros(len(values), t * h * w, dtype=torch.bool).scatter(1, tokens, True)
    return full.unflatten(1, (t, h * w)), held.unflatten(1, (t, h * w))


def plain_losses(model, clips, masks, weights):
    """The losses of fwm_hw_ld."""
    grid = (clips.shape[2] // model.encoder.tubelet, clips.shape[3] // model.encoder.patch,
            clips.shape[4] // model.encoder.patch)
    clips, count = data.normalise(clips), grid[0] * grid[1] * grid[2]
    with torch.no_grad():
        h = level_normalise(plain_encoder(model.target, clips, torch.ones(len(clips), count, dtype=torch.bool), grid))
    values = dict.fromkeys(("pred", "ctx", "fwm_static", "fwm_orth", "hw", "ld"), 0.0)
    for visible, masked in masks:
        seen = torch.zeros(len(clips), count, dtype=torch.bool).scatter(1, visible, True)
        hidden = torch.zeros(len(clips), count, dtype=torch.bool).scatter(1, masked, True)
        z = plain_encoder(model.encoder, clips, seen, grid)
        p, c = plain_predictor(model.predictor, z, visible, masked, grid)
        error = (p - h[hidden].view_as(p)).abs().mean(-1)
        values["pred"] += error.mean() / 2
        hard = error.shape[1] * torch.softmax(error.detach(), dim=1)
        values["hw"] += (hard * error).mean() / 2
        cells = torch.cartesian_prod(*map(torch.arange, grid)).float()
        distance = torch.stack([torch.cdist(cells[a], cells[b]).amin(1) for a, b in zip(visible, masked)])
        values["ctx"] += ((c - h[seen].view_as(c)).abs().mean(-1) / distance.sqrt()).mean() / 2
        full, held = on_grid(z, visible, grid)
        pairs = held[:, 1:] & held[:, :-1]
        half = z.shape[-1] // 2
        now, then = full[:, :-1][pairs], full[:, 1:][pairs]
        values["fwm_static"] += (then - now)[:, :half].abs().mean() / 2
        targets = h.unflatten(1, (grid[0], -1))
        change = (targets[:, 1:] - targets[:, :-1])[pairs]
        error = (model.heads["ld"](now[:, half:]) - change).abs().mean(-1)
        values["ld"] += (len(error) * torch.softmax(error.detach(), dim=0) * error).mean() / 2
        flat = z.flatten(0, 1) - z.flatten(0, 1).mean(0)
        values["fwm_orth"] += (flat[:, :half].T @ flat[:, half:] / (len(flat) - 1)).square().mean() / 2
    values["total"] = sum(weights[name] * value for name, value in values.items())
    return values


def plain_step(model, optimizer, clips, masks, weights, momentum):
    values = plain_losses(model, clips, masks, weights)
    values["total"].backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for average, parameter in zip(model.target.parameters(), model.encoder.parameters()):
            average.mul_(momentum).add_(parameter, alpha=1 - momentum)
    return values


def matrix_rate(size=2048, times=5):
    """Operations per second of a product of two square matrices, as large as those of the step: median."""
    a, b = torch.randn(2, size, size)
    rounds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        a @ b
        rounds.append(time.perf_counter() - began)
    return 2 * size ** 3 / statistics.median(rounds[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--crop", default="112")
    parser.add_argument("--batch", default="4")
    parser.add_argument("--compile", default="no")
    parser.add_argument("--rounds", type=int, default=15)
    flags = parser.parse_args()
    config, _ = train.parse(["--objective", "fwm_hw_ld", "--model", flags.model, "--patch", "16", "--frames", "16",
                             "--crop", flags.crop, "--batch", flags.batch, "--device", "cpu",
                             "--compile", flags.compile])
    trainer = train.Trainer(config, torch.device("cpu"))
    plain = train.Trainer(replace(config, compile="no"), torch.device("cpu"))
    plain_optimizer = torch.optim.AdamW(plain.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    clips = torch.randint(256, (config.batch, 3, 16, config.crop, config.crop), dtype=torch.uint8)
    grid = train.token_grid(16, config.crop, config.crop, 16, 2)
    weights = coefficients(trainer.objective, config.steps - 1, config.steps)
    seconds, work = {"ours": [], "plain": [], "plain, attention by its mathematics": []}, []
    for turn in range(WARMUP_TURNS + flags.rounds):
        masks = train.draw_masks(clips, torch.Generator().manual_seed(turn), grid, trainer.objective.masking)
        times = [time.perf_counter()]
        ours, _, _ = trainer.step(config.steps - 1, clips, masks)
        times.append(time.perf_counter())
        plainly = plain_step(plain.model, plain_optimizer, clips, masks, weights, config.ema)
        times.append(time.perf_counter())
        if turn == 0:  # before any step the networks have the same weights
            for name in plainly:
                torch.testing.assert_close(plainly[name].detach(), ours[name], rtol=1e-4, atol=1e-5)
        with sdpa_kernel(SDPBackend.MATH):
            plain_step(plain.model, plain_optimizer, clips, masks, weights, config.ema)
        times.append(time.perf_counter())
        if turn >= WARMUP_TURNS:
            for name, began, ended in zip(seconds, times, times[1:]):
                seconds[name].append(ended - began)
            work.append(train.flops_of(config, masks, ema=True))
    rate = matrix_rate()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; matrix products alone would take "
          f"{statistics.median(work) / rate:.2f} s a step at the rate of large ones on this machine")
    for name, rounds in seconds.items():
        print(f"{name}: {statistics.median(rounds):.2f} s a step (rounds: "
              f"{', '.join(f'{second:.2f}' for second in rounds)})")
        if name != "ours":
            ratio = statistics.median(plain / ours for plain, ours in zip(rounds, seconds["ours"]))
            most = statistics.median(plain * rate / operations for plain, operations in zip(rounds, work))
            print(f"    ours has {ratio:.2f} times its clips/s, at most {most:.2f}")


if __name__ == "__main__":
    main()
