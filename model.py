"""The networks of Video JEPA: a ViT encoder with 3-D rotary attention, and its predictor.

Shapes used in every file
    B           clips in a batch
    (t, h, w)   token grid: frames / tubelet, height / patch, width / patch
    N = t*h*w   tokens of a clip in raster order, time slowest; token id = (time*h + row)*w + column
    n, k        visible and masked tokens of one mask
    D           encoder width; an encoder gives LEVELS = 4 levels side by side, hence 4D channels
"""
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

LEVELS = 4  # outputs of four evenly spaced blocks
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class Size(NamedTuple):
    width: int
    depth: int
    heads: int
    predictor_width: int = 256
    predictor_depth: int = 8
    predictor_heads: int = 8


SIZES = {
    # For two CPU cores.
    "tiny": Size(128, 4, 4, predictor_width=64, predictor_depth=2, predictor_heads=4),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),  # the paper's: 86,241,792 + 10,455,040 parameters
    "vit_large": Size(1024, 24, 16),
}


def token_grid(frames, height, width, patch, tubelet):
    """The grid (t, h, w) of a clip of so many frames and pixels. Raises ValueError where it does
    not divide evenly."""
    if frames % tubelet:
        raise ValueError(f"{frames} frames do not divide into tubelets of {tubelet}; "
                         f"choose a multiple of {tubelet}")
    if height % patch or width % patch:
        raise ValueError(f"a {height}x{width} crop does not divide into {patch}x{patch} patches; "
                         f"choose multiples of {patch}")
    return frames // tubelet, height // patch, width // patch


def normalise(clips):
    """Clips [B, 3, T, H, W], uint8 or float in 0..255 -> float32 of the same shape, with ImageNet's
    mean and deviation."""
    # The constants stay Python numbers: a tensor of them would be copied to the GPU, and the copy
    # waited for.
    return torch.stack([(clips[:, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1)


def take(features, tokens):
    """features [B, N, C] at token ids [B, n] -> [B, n, C]."""
    first = features.shape[1] * torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    # Whole rows of all clips at once: four times as fast as `gather` with an index per channel.
    rows = features.flatten(0, 1).index_select(0, (first + tokens).flatten())
    return rows.unflatten(0, tokens.shape)


def places(tokens, grid):
    """Time, row and column of token ids [...] on a grid (t, h, w): three tensors of that shape."""
    _, h, w = grid
    return tokens // (h * w), tokens // w % h, tokens % w


def level_normalise(features):
    """Layer-normalise each of the four levels on its own, without learned scale: [B, n, 4D] -> [B,
    n, 4D].

    The encoder's own norms have a scale that is learned, and that the losses could shrink; targets
    are normalised once more, so that each level keeps an equal say in the loss.
    """
    levels = features.unflatten(-1, (LEVELS, -1))  # (B, n, 4, D)
    return F.layer_norm(levels, levels.shape[-1:]).flatten(-2)  # (B, n, 4D)


class Rotary(nn.Module):
    """3-D rotary position embedding: the angles by which attention rotates queries and keys.

    Time, row and column each rotate 2 * ((head_dim // 3) // 2) channels of every head, in this
    order; leftover channels have frequency zero and stay as they are. Channels (2j, 2j+1) of an
    axis with m such pairs rotate by position * 10000^(-j/m), so a query-key product depends on how
    far apart two tokens are, not on where they are.
    """

    def __init__(self, head_dim):
        super().__init__()
        pairs = (head_dim // 3) // 2
        of_an_axis = 10000 ** (-torch.arange(pairs) / pairs)
        frequencies = torch.block_diag(of_an_axis, of_an_axis, of_an_axis)  # (3, 3 * pairs)
        frequencies = F.pad(frequencies, (0, head_dim // 2 - 3 * pairs))  # (3, head_dim / 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens, grid):
        """Token ids [B, n] of a grid (t, h, w) -> cosine and sine of each angle, [B, 1, n,
        head_dim / 2, 2]."""
        _, h, w = grid
        # Rows and columns of every crop are stretched over the positions 0..15; time counts steps.
        stretch = 1.0, 15 / max(h - 1, 1), 15 / max(w - 1, 1)
        axes = [place * factor for place, factor in zip(places(tokens, grid), stretch)]
        position = torch.stack(axes, dim=-1)  # (B, n, 3)
        # A sum, not a matrix product: autocast would round the positions of a product to bfloat16.
        angles = (position.unsqueeze(-1) * self.frequencies).sum(-2)  # (B, n, head_dim / 2)
        return torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(1)  # alike for all heads


def rotate(x, rotation):
    """Rotate each pair of neighbouring channels of x [B, heads, n, head_dim] by its token's angle:
    (a, b) -> (a cos - b sin, a sin + b cos), which is (a + ib) (cos + i sin). rotation: as `Rotary`
    gives it."""
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses real numbers alone
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:  # five times as fast on a CPU
        pairs = torch.view_as_complex(pairs.to(rotation.dtype))
        pairs = torch.view_as_real(pairs * torch.view_as_complex(rotation))
    return pairs.flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rotation):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, n, 3, heads, head_dim)
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))  # (B, heads, n, head_dim) each
        # A copy of v: the view would keep all of qkv in memory until the backward pass.
        x = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v.contiguous())
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, n, width)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(), fc2=nn.Linear(4 * width, width)))

    def forward(self, x, rotation):
        x = x + self.attn(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))  # (B, n, width)


def initialise(network):
    """Truncated normal weights (std 0.02), zero biases; block i (from 1) divides its output
    projections by sqrt(2i)."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for i, block in enumerate(network.blocks, start=1):
        block.attn.proj.weight.data /= (2 * i) ** 0.5
        block.mlp.fc2.weight.data /= (2 * i) ** 0.5


class Encoder(nn.Module):
    """Video ViT: tubelet embedding, optional masking, transformer blocks, four normalised levels.
    No class token, no registers, no absolute positions.

    Four levels, since the last one alone drops what shallow blocks know, where things are and how
    they look. Each has a norm of its own, since later blocks have larger outputs.
    """

    def __init__(self, size, patch, tubelet):
        super().__init__()
        self.width, self.patch, self.tubelet = size.width, patch, tubelet
        self.embed = nn.Linear(3 * tubelet * patch ** 2, size.width)
        self.video = nn.Parameter(1e-6 * torch.randn(1, 1, size.width))
        self.rotary = Rotary(size.width // size.heads)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        # Depth 12: the outputs of blocks 2, 5, 8 and 11.
        self.levels = [(level + 1) * size.depth // LEVELS - 1 for level in range(LEVELS)]
        self.norms = nn.ModuleList(nn.LayerNorm(size.width, eps=1e-6) for _ in range(LEVELS))
        initialise(self)

    def forward(self, clips, visible=None):
        """clips [B, 3, T, H, W], normalised; visible: token ids [B, n], None for all -> features
        [B, n, 4D]."""
        grid = token_grid(*clips.shape[2:], self.patch, self.tubelet)
        t, h, w = grid
        x = clips.reshape(-1, 3, t, self.tubelet, h, self.patch, w, self.patch)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, t, h, w, 3, tubelet, patch, patch)
        x = x.flatten(1, 3).flatten(2)  # (B, N, pixels of a token)
        tokens = torch.arange(x.shape[1], device=x.device).unsqueeze(0)  # (1, N)
        if visible is not None:
            x, tokens = take(x, visible), visible  # (B, n, pixels), (B, n)
        x = self.embed(x) + self.video  # (B, n, D)
        rotation = self.rotary(tokens, grid)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x, rotation)
            if i in self.levels:
                features.append(self.norms[len(features)](x))
        return torch.cat(features, dim=-1)  # (B, n, 4D)


class Predictor(nn.Module):
    """Predicts the targets at masked positions from the visible tokens, and also at the visible
    positions."""

    def __init__(self, size):
        super().__init__()
        channels, width = LEVELS * size.width, size.predictor_width
        self.embed = nn.Sequential(
            nn.Linear(channels, size.width), nn.GELU(), nn.Linear(size.width, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.video = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.rotary = Rotary(width // size.predictor_heads)
        self.blocks = nn.ModuleList(
            Block(width, size.predictor_heads) for _ in range(size.predictor_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_masked = nn.Linear(width, channels)
        self.to_visible = nn.Linear(width, channels)
        initialise(self)

    def forward(self, z, visible, masked, grid, context=True):
        """z [B, n, 4D] at token ids visible [B, n]; masked [B, k] -> p [B, k, 4D] and c [B, n, 4D],
        or None in place of c where no context is asked for."""
        n = visible.shape[1]
        queries = self.mask_token.expand(*masked.shape, -1)  # (B, k, width)
        x = torch.cat((self.embed(z), queries), dim=1) + self.video  # (B, n + k, width)
        # The order of tokens carries no meaning: each brings its own position.
        rotation = self.rotary(torch.cat((visible, masked), dim=1), grid)
        for block in self.blocks:
            x = block(x, rotation)
        x = self.norm(x)
        return self.to_masked(x[:, n:]), self.to_visible(x[:, :n]) if context else None


# -------------------------------------------------------------------------- weights of V-JEPA 2.1

THEIR_NAMES = {"patch_embed.proj.": "embed.", "video_mod_embed": "video", "norms_block.": "norms."}


def load_tensors(path):
    """What torch.save wrote to a file, as far as that is tensors, numbers and text: no code from
    the file ever runs. Raises OSError, or ValueError for any other file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        # Torch itself compares no checksums.
        whole = not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is None
    except OSError:
        raise
    except Exception:  # whatever the bytes of another file lead to
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged, cut short, or not a file of tensors that torch.save "
                         "wrote")
    return content


def load_vjepa(path):
    """The encoder of a V-JEPA 2.1 checkpoint, and what it is: {"model", "patch", "tubelet"}.

    The file holds a dict with weights under "ema_encoder", "target_encoder" or "encoder", taken in
    this order. Every weight must be there and fit, and none may be left over, except those for
    single images. Raises FileNotFoundError, or ValueError for any other file.
    """
    content = load_tensors(path)
    content = content if isinstance(content, dict) else {}
    for chosen in ("ema_encoder", "target_encoder", "encoder"):
        if isinstance(content.get(chosen), dict):
            break
    else:
        raise ValueError(f"{path} holds no 'ema_encoder', 'target_encoder' or 'encoder' with "
                         "weights by name")

    weights = {}
    for name, weight in content[chosen].items():
        name = name.removeprefix("module.").removeprefix("backbone.")
        for theirs, ours in THEIR_NAMES.items():
            name = name.replace(theirs, ours)
        if "img" not in name:  # for single images
            weights[name] = weight
    if "norm.weight" in weights and "video" not in weights:
        raise ValueError(f"'{chosen}' of {path} holds weights of V-JEPA 2, which has one norm at "
                         "its end; V-JEPA 2.1 is needed, which has one for each of four levels")

    sizes = {size.width: name for name, size in SIZES.items()}
    try:
        width, _, tubelet, patch, _ = weights["embed.weight"].shape
        encoder = Encoder(SIZES[sizes[width]], patch, tubelet)
        # A convolution whose stride is its kernel is a linear layer.
        weights["embed.weight"] = weights["embed.weight"].flatten(1)
        encoder.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        # Torch's names everything that is missing, left over or wrong.
        what = " ".join(str(error).split())
        raise ValueError(f"'{chosen}' of {path} is not an encoder of V-JEPA 2.1 of a width in "
                         f"{list(sizes)}: {what}") from None
    return encoder, {"model": sizes[width], "patch": patch, "tubelet": tubelet}
