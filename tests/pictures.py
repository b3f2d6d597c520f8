"""Pictures that a person understands: what masks hide, what features see, where motion lies.

    python tests/pictures.py --checkpoint runs/NAME/last.pt     of generated clips, into its folder
    ... --benchmark ucf101 --root DIR                           of the clips of a benchmark
    ... --train-list A.csv --test-list B.csv                    of your own videos

masks.png, features.png and motion.png. Takes the flags of probe.py.
"""
import io
import itertools
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import probe
from data import command, write_file
from model import token_grid
from objectives import Masking, draw_masks
from probe import HELD_OUT, last_level
from synthetic import DIRECTIONS, WORLDS

MASKED_COLOUR = (1.0, 0.45, 0.0)
COLOURS = ("#d62728", "#ff7f0e", "#bcbd22", "#2ca02c", "#17becf", "#1f77b4", "#9467bd",
           "#e377c2")
LEFT, TOP = 110, 40  # of the pictures on masks.png and features.png: room for words


def save_image(path, image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    write_file(path, buffer.getvalue())
    print(f"written to {path}")


def enlarge(cells, times):
    """[..., h, w] -> [..., h * times, w * times]."""
    return cells.repeat_interleave(times, -2).repeat_interleave(times, -1)


def tint_masked(frames, visible, grid, patch):
    """Frames [t, 3, H, W] in 0..1 with every token tinted that is not among the visible ones [n].
    """
    masked = torch.ones(math.prod(grid), dtype=torch.bool)
    masked[visible] = False
    masked = enlarge(masked.view(grid), patch).unsqueeze(1)  # (t, 1, H, W)
    tinted = 0.25 * frames + 0.75 * torch.tensor(MASKED_COLOUR).view(3, 1, 1)
    return torch.where(masked, tinted, frames)


def principal_colours(tokens):
    """The three main components of tokens [B, N, D] as red, green and blue in 0..1: [B, N, 3], one
    basis for all clips.

    A component's sign is arbitrary: here its largest entry is positive, so a second look gives the
    same picture.
    """
    flat = tokens.flatten(0, 1).cpu().double()
    flat = flat - flat.mean(0)
    basis = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(-1)  # (D, 3), strongest 1st
    basis = basis * basis.take_along_dim(basis.abs().argmax(0, keepdim=True), 0).sign()
    scores = flat @ basis  # (B * N, 3)
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    shares = (scores - low) / (high - low).clamp(min=1e-12)
    return shares.clamp(0, 1).float().unflatten(0, tokens.shape[:2])


def save_rows(path, rows, title):
    """Write rows of pictures, (name, [t, 3, H, W] in 0..1) each, with their names and a title."""
    pictures = torch.cat([row for _, row in rows])  # (rows * t, 3, H, W)
    pictures = enlarge(pictures, max(1, 128 // pictures.shape[-1]))
    grid = make_grid(pictures, nrow=len(rows[0][1]), pad_value=1)
    sheet = Image.fromarray((255 * grid).round().byte().permute(1, 2, 0).numpy())
    image = Image.new("RGB", (max(LEFT + sheet.width, 560), TOP + sheet.height), "white")
    image.paste(sheet, (LEFT, TOP))
    draw = ImageDraw.Draw(image)
    draw.text((4, 4), title, "black")
    for i, (name, _) in enumerate(rows):
        draw.text((4, TOP + 2 + i * (pictures.shape[-1] + 2)), name, "black")
    save_image(path, image)


def clip_pictures(frozen, untrained, clips, masking):
    """Write masks.png and features.png of clips [B, 3, T, H, W] in 0..255, a picture for each time
    step of the grid.

    Both have three rows for each clip. masks.png: its frames, and what each of the two masks hides
    of them, as a batch of these clips is cut. features.png: its frames, the main components of its
    features, and the untrained encoder's.
    """
    patch, tubelet = frozen.encoder.patch, frozen.encoder.tubelet
    grid = token_grid(*clips.shape[2:], patch, tubelet)
    frames = clips[:, :, ::tubelet].transpose(1, 2) / 255  # (B, t, 3, H, W)
    generator = torch.Generator().manual_seed(0)
    masks = draw_masks(clips, generator, generator, grid, masking)
    colours = []
    for each in (frozen, untrained):
        tokens = torch.cat([last_level(each.encoder, clip.unsqueeze(0)) for clip in clips])
        cells = principal_colours(tokens).unflatten(1, grid).movedim(-1, 2)  # (B, t, 3, h, w)
        colours.append(enlarge(cells, patch))

    masked, features = [], []
    for i, shown in enumerate(frames):
        masked.append((f"clip {i + 1}", shown))
        for j, (visible, _) in enumerate(masks):
            masked.append((f"mask {j + 1}", tint_masked(shown, visible[i], grid, patch)))
        features.append((f"clip {i + 1}", shown))
        features += [("trained", colours[0][i]), ("random weights", colours[1][i])]
    steps = f"Time runs from left to right, one picture for every {tubelet} frames."
    save_rows(frozen.folder / "masks.png", masked,
              f"Orange tokens are hidden from the encoder, and predicted.\n{steps}")
    save_rows(frozen.folder / "features.png", features,
              "Three main components of the last level's tokens as red, green and blue.\n" + steps)


def discriminant_axes(x, labels):
    """The two axes [D, 2] along which classes of x [n, D], mean 0, lie furthest apart for their
    spread (Fisher)."""
    classes = range(int(labels.max()) + 1)
    means = torch.stack([x[labels == label].mean(0) for label in classes])  # (classes, D)
    within = (x - means[labels]).T @ (x - means[labels]) / len(x)
    within += 1e-3 * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    root = torch.linalg.inv(torch.linalg.cholesky(within))
    between = root @ (means.T @ means) @ root.T
    return root.T @ torch.linalg.eigh(between).eigenvectors[:, -2:].flip(-1)


def plot_points(panels, side=400, edge=60, joined=False):
    """An image of panels, {title: {name: (x values, y values)}}, one below the other, each on
    scales of its own. joined: a line through the points of a name."""
    image = Image.new("RGB", (side + 5 * edge, len(panels) * (side + 2 * edge)), "white")
    draw = ImageDraw.Draw(image)
    for i, (title, series) in enumerate(panels.items()):
        top = edge + i * (side + 2 * edge)
        draw.rectangle((edge, top, edge + side, top + side), outline="black")
        draw.text((edge, top - 24), title, "black")
        all_x, all_y = (sum(values, []) for values in zip(*series.values()))
        for j, (name, points) in enumerate(series.items()):
            colour = COLOURS[j % len(COLOURS)]
            draw.text((edge + side + 8, top + 16 * j), name, colour)
            places = [(edge + side * (x - min(all_x)) / (max(all_x) - min(all_x)),
                       top + side * (max(all_y) - y) / (max(all_y) - min(all_y)))
                      for x, y in zip(*points)]
            for x, y in places:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
            if joined:
                draw.line(places, colour)
    return image


def motion_picture(frozen, untrained, count):
    """Write motion.png: held-out generated clips on the two discriminant axes of the motion factor
    that their world names first, coloured by its class.

    Axes are fitted on the clips that a linear head learns from; the points are others.
    """
    world = WORLDS[frozen.config.get("world", "default")]
    factor = world.linear[0]
    names = [f"{factor} {i}" for i in range(world.classes[factor])]
    if factor == "direction":
        names = DIRECTIONS
    panels = {}
    for each in (untrained, frozen):
        pooled, labels = [], []
        for i, clips in enumerate((count, max(1, count // 3))):
            source = world(each.config["frames"], each.config["crop"], HELD_OUT + i)
            labels.append(source.factors(range(clips))[factor])
            pooled.append(torch.cat([last_level(each.encoder, source.clips(items)).mean(1).cpu()
                                     for items in torch.arange(clips).split(64)]).double())
        mean = pooled[0].mean(0)
        points = (pooled[1] - mean) @ discriminant_axes(pooled[0] - mean, labels[0])  # (n, 2)
        panels[f"{each.about}: {factor}, first and second discriminant axis"] = {
            name: points[labels[1] == i].T.tolist() for i, name in enumerate(names)}
    save_image(frozen.folder / "motion.png", plot_points(panels))


def some_clips(source, count=4):
    """A few clips of a source that can be read, the same ones every time: [count, 3, T, H, W]."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    read = (data.read_all([item], source)[0] for item in order)
    chosen = list(itertools.islice(filter(torch.is_tensor, read), count))
    if not chosen:
        raise ValueError(f"none of the {len(source)} clips can be read; one is "
                         f"{data.read_all(order[:1], source)[0]}")
    return torch.stack(chosen)


@command("pictures.py", smaller="number of --clips, or --crop")
def main(arguments=None):
    flags = probe.parse(arguments)
    frozen = probe.open_frozen(flags, flags.untrained is not None)
    untrained = probe.open_frozen(flags, True)
    frozen.folder.mkdir(parents=True, exist_ok=True)
    frames, crop = frozen.config["frames"], frozen.config["crop"]
    if flags.benchmark or flags.train_list:
        _, _, source = probe.open_sources(flags, frames, crop)
        clips = some_clips(source)
    else:
        world = WORLDS[frozen.config.get("world", "default")]
        clips = world(frames, crop, HELD_OUT).clips(range(4))
    masking = Masking()
    if flags.checkpoint:
        masking = Masking(**probe.load_checkpoint(flags.checkpoint)["definition"]["masking"])
    clip_pictures(frozen, untrained, clips, masking)
    motion_picture(frozen, untrained, flags.clips)


if __name__ == "__main__":
    sys.exit(main())
