"""The networks against METHOD.md section 2: sizes, rotary positions, both forward passes, initial
weights.

The `naive_...` functions share no code with model.py: they handle one token and one head at a time,
in float64.
"""
import itertools
import math

import numpy as np
import pytest
import torch

from model import SIZES, Encoder, Predictor, Rotary, Size, level_normalise, rotate, token_grid

GRIDS = [(4, 3, 5), (3, 5, 4), (2, 1, 3), (3, 4, 1), (1, 2, 2)]
PATCH, TUBELET = 3, 2
# Heads of 14 channels: 4 + 4 + 4 turn and 2 are left over. Eight blocks, so that not every block is
# a level.
SMALL = Size(width=28, depth=8, heads=2, predictor_width=32, predictor_depth=2, predictor_heads=2)


def cells_of(grid):
    """Every (time, row, column) in raster order, time slowest: a token's id is its place in this
    list."""
    return list(itertools.product(*map(range, grid)))


def random_tokens(batch, count, grid, generator):
    """Token ids [batch, count]: for each clip another random subset, in no order."""
    return torch.stack(
        [torch.randperm(math.prod(grid), generator=generator)[:count] for _ in range(batch)]
    )


def random_clips(batch, grid, generator, dtype=torch.float64):
    t, h, w = grid
    return torch.randn(
        batch, 3, t * TUBELET, h * PATCH, w * PATCH, generator=generator, dtype=dtype
    )


def with_random_parameters(network, generator):
    """Fresh networks have zero biases and norms of one; random values show whether each of them is
    used rightly."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            is_matrix = name.endswith("weight") and parameter.dim() > 1
            parameter.copy_(
                noise / math.sqrt(parameter[0].numel()) if is_matrix else 0.5 + 0.3 * noise
            )
    return network


# -------------------------------------------------------------------------------------------- sizes


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameter_counts_are_those_of_the_study():
    with torch.device("meta"):  # shapes without memory
        assert count_parameters(Encoder(SIZES["vit_base"], patch=16, tubelet=2)) == 86_241_792
        assert count_parameters(Predictor(SIZES["vit_base"])) == 10_455_040


@pytest.mark.parametrize(
    "depth, levels", [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (4, [0, 1, 2, 3])]
)
def test_levels_are_four_evenly_spaced_blocks(depth, levels):
    assert Encoder(Size(width=12, depth=depth, heads=1), PATCH, TUBELET).levels == levels


def test_token_grid_counts_tubelets_and_patches():
    assert token_grid(16, 224, 224, patch=16, tubelet=2) == (8, 14, 14)
    assert token_grid(3, 10, 35, patch=5, tubelet=1) == (3, 2, 7)


@pytest.mark.parametrize("frames, height, width, complaint", [
    (15, 224, 224, "15 frames"), (16, 220, 224, "220x224"), (16, 224, 230, "224x230")])
def test_token_grid_names_what_does_not_divide(frames, height, width, complaint):
    with pytest.raises(ValueError, match=complaint):
        token_grid(frames, height, width, patch=16, tubelet=2)


# ------------------------------------------------------------------------------------------- rotary


def naive_rotate(vector, cell, grid):
    """Turn the channels of one head of the token at cell (time, row, column)."""
    axis_channels = 2 * ((len(vector) // 3) // 2)
    turned = [float(value) for value in vector]
    for axis in range(3):
        position = float(cell[axis])
        if axis > 0 and grid[axis] > 1:
            position *= (16 - 1) / (grid[axis] - 1)
        for pair in range(axis_channels // 2):
            angle = position * 10000 ** (-pair / (axis_channels / 2))
            first = axis * axis_channels + 2 * pair
            a, b = float(vector[first]), float(vector[first + 1])
            turned[first] = a * math.cos(angle) - b * math.sin(angle)
            turned[first + 1] = a * math.sin(angle) + b * math.cos(angle)
    return turned


@pytest.mark.parametrize("grid", GRIDS + [(8, 14, 14)])
@pytest.mark.parametrize("head_dim", [64, 32, 14, 6])
def test_rotation_equals_the_naive_one(head_dim, grid):
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(2, min(4, math.prod(grid)), grid, generator)
    x = torch.randn(2, 3, tokens.shape[1], head_dim, generator=generator, dtype=torch.float64)
    turned = rotate(x, Rotary(head_dim)(tokens, grid))
    cells = cells_of(grid)
    for clip, head, i in itertools.product(*map(range, x.shape[:3])):
        expected = torch.tensor(
            naive_rotate(x[clip, head, i], cells[tokens[clip, i]], grid), dtype=torch.float64
        )
        # Angles of up to 15 are float32, hence known to about 1e-6.
        torch.testing.assert_close(turned[clip, head, i], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("head_dim, rotated", [(64, 60), (32, 30), (14, 12)])
def test_leftover_channels_stay_and_no_length_changes(head_dim, rotated):
    x = torch.randn(1, 2, 60, head_dim, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, Rotary(head_dim)(torch.arange(60).unsqueeze(0), (4, 3, 5)))
    assert torch.equal(turned[..., rotated:], x[..., rotated:])
    assert not torch.isclose(turned[:, :, 1:, :rotated], x[:, :, 1:, :rotated]).all(dim=2).any()
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def attention_score(rotary, query, key, query_cell, key_cell, grid):
    cells = cells_of(grid)
    turn = rotary(torch.tensor([[cells.index(query_cell), cells.index(key_cell)]]), grid)
    turned = rotate(torch.stack((query, key)).view(1, 1, 2, -1), turn)
    return turned[0, 0, 0] @ turned[0, 0, 1]


@pytest.mark.parametrize("shift", [(2, 0, 0), (0, 3, 0), (0, 0, 1), (1, 2, 1)])
def test_scores_depend_on_relative_position_only(shift):
    grid, query_cell, key_cell = (5, 6, 4), (0, 1, 2), (2, 2, 0)
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    rotary = Rotary(64)
    here = attention_score(rotary, query, key, query_cell, key_cell, grid)
    moved_query, moved_key = (tuple(map(sum, zip(cell, shift))) for cell in (query_cell, key_cell))
    shifted = attention_score(rotary, query, key, moved_query, moved_key, grid)
    torch.testing.assert_close(shifted, here, rtol=0, atol=2e-5)
    # And it does depend on it: moving the key alone changes the score.
    assert abs(attention_score(rotary, query, key, query_cell, moved_key, grid) - here) > 1e-2


def test_every_crop_spans_the_same_rows_and_columns_but_time_counts_steps():
    rotary = Rotary(64)

    def turn(cell, grid):
        return rotary(torch.tensor([[cells_of(grid).index(cell)]]), grid)

    small, large = (3, 4, 6), (5, 14, 16)
    torch.testing.assert_close(
        turn((2, 3, 5), small), turn((2, 13, 15), large)
    )  # last row, last column
    assert not torch.allclose(
        turn((2, 3, 5), small), turn((4, 13, 15), large)
    )  # last, but later, step


# ----------------------------------------------------------------------------------- naive networks


def naive_layer_norm(x, weight=1.0, bias=0.0, epsilon=1e-6):
    rows = [(row - row.mean()) / math.sqrt(((row - row.mean()) ** 2).mean() + epsilon) for row in x]
    return np.stack(rows) * weight + bias


def naive_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


class Parameters:
    """A network's parameters as float64 arrays by name, and the two layers that have some."""

    def __init__(self, network):
        self.arrays = {
            name: array.detach().double().numpy() for name, array in network.named_parameters()
        }

    def linear(self, name, x):
        return x @ self.arrays[f"{name}.weight"].T + self.arrays[f"{name}.bias"]

    def norm(self, name, x):
        return naive_layer_norm(x, self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"])


def naive_attention(queries, keys, values, cells, grid):
    """One head over all tokens of one clip, [n, head_dim] each."""
    turned_queries = np.array(
        [naive_rotate(query, cell, grid) for query, cell in zip(queries, cells)]
    )
    turned_keys = np.array([naive_rotate(key, cell, grid) for key, cell in zip(keys, cells)])
    outputs = []
    for query in turned_queries:
        likeness = np.exp([query @ key / math.sqrt(len(query)) for key in turned_keys])
        outputs.append(
            sum(weight * value for weight, value in zip(likeness / likeness.sum(), values))
        )
    return np.array(outputs)


def naive_block(parameters, name, x, heads, cells, grid):
    """Pre-norm attention and MLP, both added to x [n, width]; qkv holds all queries, then keys,
    then values."""
    queries, keys, values = np.split(
        parameters.linear(f"{name}.attn.qkv", parameters.norm(f"{name}.norm1", x)), 3, 1
    )
    attended = [
        naive_attention(*head, cells, grid)
        for head in zip(*(np.split(part, heads, axis=1) for part in (queries, keys, values)))
    ]
    x = x + parameters.linear(f"{name}.attn.proj", np.concatenate(attended, axis=1))
    hidden = naive_gelu(parameters.linear(f"{name}.mlp.fc1", parameters.norm(f"{name}.norm2", x)))
    return x + parameters.linear(f"{name}.mlp.fc2", hidden)


def naive_encoder(encoder, size, clip, tokens, grid):
    """One clip [3, T, H, W], token ids in a list -> [n, 4D]."""
    parameters = Parameters(encoder)
    cells = [cells_of(grid)[token] for token in tokens]
    embedded = []
    for time, row, column in cells:
        pixels = clip[:, time * TUBELET:(time + 1) * TUBELET, row * PATCH:(row + 1) * PATCH,
                      column * PATCH:(column + 1) * PATCH].numpy()
        embedded.append(parameters.arrays["embed.weight"] @ pixels.flatten())
    x = np.array(embedded) + parameters.arrays["embed.bias"] + parameters.arrays["video"][0, 0]
    levels = []
    for i in range(size.depth):
        x = naive_block(parameters, f"blocks.{i}", x, size.heads, cells, grid)
        if (i + 1) % (size.depth // 4) == 0:
            levels.append(parameters.norm(f"norms.{len(levels)}", x))
    return torch.from_numpy(np.concatenate(levels, axis=1))


def naive_predictor(predictor, size, z, visible, masked, grid):
    """One clip: z [n, 4D], token ids in two lists -> p [k, 4D], c [n, 4D]. Mask tokens come first
    here."""
    parameters = Parameters(predictor)
    cells = [cells_of(grid)[token] for token in masked + visible]
    context = parameters.linear("embed.2", naive_gelu(parameters.linear("embed.0", z.numpy())))
    queries = np.stack([parameters.arrays["mask_token"][0, 0]] * len(masked))
    x = np.concatenate((queries, context)) + parameters.arrays["video"][0, 0]
    for i in range(size.predictor_depth):
        x = naive_block(parameters, f"blocks.{i}", x, size.predictor_heads, cells, grid)
    x = parameters.norm("norm", x)
    p, c = (
        parameters.linear("to_masked", x[: len(masked)]),
        parameters.linear("to_visible", x[len(masked) :]),
    )
    return torch.from_numpy(p), torch.from_numpy(c)


@pytest.fixture(scope="module")
def encoder():
    return with_random_parameters(
        Encoder(SMALL, PATCH, TUBELET).double(), torch.Generator().manual_seed(3)
    ).eval()


@pytest.fixture(scope="module")
def predictor():
    return with_random_parameters(
        Predictor(SMALL).double(), torch.Generator().manual_seed(4)
    ).eval()


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_encoder_equals_the_naive_one(encoder, grid):
    generator = torch.Generator().manual_seed(5)
    clips = random_clips(2, grid, generator)
    visible = random_tokens(2, min(5, math.prod(grid)), grid, generator)
    features = encoder(clips, visible)
    for clip, tokens, result in zip(clips, visible.tolist(), features):
        expected = naive_encoder(encoder, SMALL, clip, tokens, grid)
        torch.testing.assert_close(
            result, expected, rtol=0, atol=5e-6
        )  # the rotary angles are float32


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_predictor_equals_the_naive_one(predictor, grid):
    generator = torch.Generator().manual_seed(6)
    tokens = random_tokens(2, min(7, math.prod(grid)), grid, generator)
    visible, masked = tokens[:, :3], tokens[:, 3:]
    z = torch.randn(2, 3, 4 * SMALL.width, generator=generator, dtype=torch.float64)
    p, c = predictor(z, visible, masked, grid)
    for i in range(2):
        expected = naive_predictor(
            predictor, SMALL, z[i], visible[i].tolist(), masked[i].tolist(), grid
        )
        torch.testing.assert_close((p[i], c[i]), expected, rtol=0, atol=5e-6)


# --------------------------------------------------------------------------------- laws of networks


@torch.no_grad()
def test_seeing_all_tokens_equals_seeing_without_a_mask(encoder):
    grid = (4, 3, 5)
    clips = random_clips(2, grid, torch.Generator().manual_seed(7))
    torch.testing.assert_close(encoder(clips, torch.arange(60).expand(2, -1)), encoder(clips))


@torch.no_grad()
def test_encoder_does_not_look_at_hidden_pixels(encoder):
    grid, hidden = (4, 3, 5), (2, 1, 4)
    clips = random_clips(1, grid, torch.Generator().manual_seed(8))
    visible = torch.tensor([[token for token, cell in enumerate(cells_of(grid)) if cell != hidden]])
    changed = clips.clone()
    changed[:, :, 4:6, 3:6, 12:15] += 1.0  # the pixels of the hidden cell
    assert torch.equal(encoder(changed, visible), encoder(clips, visible))
    assert not torch.allclose(encoder(changed), encoder(clips))


@torch.no_grad()
def test_order_of_visible_tokens_carries_no_meaning(encoder):
    grid, generator = (4, 3, 5), torch.Generator().manual_seed(9)
    clips, visible = random_clips(2, grid, generator), random_tokens(2, 11, grid, generator)
    order = torch.randperm(11, generator=generator)
    torch.testing.assert_close(encoder(clips, visible[:, order]), encoder(clips, visible)[:, order])


@torch.no_grad()
def test_order_of_predicted_tokens_carries_no_meaning(predictor):
    grid, generator = (4, 3, 5), torch.Generator().manual_seed(10)
    tokens = random_tokens(2, 20, grid, generator)
    visible, masked = tokens[:, :8], tokens[:, 8:]
    z = torch.randn(2, 8, 4 * SMALL.width, generator=generator, dtype=torch.float64)
    visible_order, masked_order = (
        torch.randperm(8, generator=generator),
        torch.randperm(12, generator=generator),
    )
    p, c = predictor(z, visible, masked, grid)
    p_again, c_again = predictor(
        z[:, visible_order], visible[:, visible_order], masked[:, masked_order], grid
    )
    torch.testing.assert_close(p_again, p[:, masked_order])
    torch.testing.assert_close(c_again, c[:, visible_order])


@torch.no_grad()
def test_predictions_at_masked_tokens_need_none_at_visible_ones(predictor):
    grid, generator = (4, 3, 5), torch.Generator().manual_seed(10)
    tokens = random_tokens(2, 20, grid, generator)
    visible, masked = tokens[:, :8], tokens[:, 8:]
    z = torch.randn(2, 8, 4 * SMALL.width, generator=generator, dtype=torch.float64)
    p, c = predictor(z, visible, masked, grid, context=False)
    assert c is None
    torch.testing.assert_close(p, predictor(z, visible, masked, grid)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS + [(2, 1, 1), (8, 2, 7)])
@pytest.mark.parametrize("batch", [1, 3])
def test_networks_take_any_grid(grid, batch):
    generator = torch.Generator().manual_seed(11)
    encoder, predictor = Encoder(SMALL, PATCH, TUBELET), Predictor(SMALL)
    with torch.no_grad():
        predictor.mask_token += 1.0  # from zero no gradient would reach the first blocks' values
    tokens = random_tokens(batch, math.prod(grid), grid, generator)
    visible, masked = tokens[:, :-1], tokens[:, -1:]
    z = encoder(random_clips(batch, grid, generator, torch.float32), visible)
    p, c = predictor(z, visible, masked, grid)
    assert z.shape == c.shape == (batch, math.prod(grid) - 1, 4 * SMALL.width)
    assert p.shape == (batch, 1, 4 * SMALL.width)
    (p.square().mean() + c.square().mean()).backward()
    for name, parameter in itertools.chain(
        encoder.named_parameters(), predictor.named_parameters()
    ):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_level_normalise_equals_the_naive_one():
    features = 3 + 2 * torch.randn(
        2, 5, 4 * 6, generator=torch.Generator().manual_seed(12), dtype=torch.float64
    )
    expected = features.clone()
    for clip, token, level in itertools.product(range(2), range(5), range(4)):
        one_level = features[clip, token, 6 * level:6 * level + 6].numpy()
        # This norm has no learned scale, and PyTorch's own epsilon.
        expected[clip, token, 6 * level:6 * level + 6] = torch.from_numpy(
            naive_layer_norm([one_level], epsilon=1e-5)[0])
    torch.testing.assert_close(level_normalise(features), expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------- initial weights


@pytest.fixture(scope="module")
def fresh_networks():
    """Wide enough that the spread of one weight matrix is known to 1%."""
    torch.manual_seed(13)
    size = Size(
        width=128, depth=4, heads=2, predictor_width=96, predictor_depth=3, predictor_heads=2
    )
    return Encoder(size, patch=8, tubelet=2), Predictor(size)


@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "predictor"])
def test_weights_start_with_std_0_02_and_deep_blocks_add_less(fresh_networks, which):
    checked = 0
    for name, parameter in fresh_networks[which].named_parameters():
        if not name.endswith("weight") or "norm" in name:
            continue
        std = 0.02
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            block = int(name.split(".")[1]) + 1
            std /= math.sqrt(2 * block)
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name
        checked += 1
    assert checked == (1 + 4 * 4, 2 + 4 * 3 + 2)[which]


@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "predictor"])
def test_biases_start_at_zero_and_norms_at_one(fresh_networks, which):
    for name, parameter in fresh_networks[which].named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_learned_embeddings_start_as_stated(fresh_networks):
    encoder, predictor = fresh_networks
    assert not predictor.mask_token.any()
    for network, width in ((encoder, 128), (predictor, 96)):
        assert network.video.shape == (1, 1, width)
        assert network.video.std().item() == pytest.approx(1e-6, rel=0.3)
