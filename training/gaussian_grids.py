"""Compute the tables ``gauss2`` .. ``gauss4`` and ``gausspair2`` .. ``gausspair4``: grids of least squared error for a
standard normal variable x, of one dimension (n = 4, 8, 16 points) and of two (n = 16, 64, 256).

    D(t) = E min_i |x - t_i|^2 / p        least where every t_i is the mean of x over its own Voronoi cell

p = 1: Lloyd's iteration (S. Lloyd, IEEE Trans. Inf. Theory 28, 1982; J. Max, IRE Trans. Inf. Theory 6, 1960) with
cell masses and means in closed form; the optimum is unique. p = 2: the plane is cut into small squares, each with its
exact mass and mean; L-BFGS minimizes D over these atoms. D has many local minima, which differ by a percent: from the
best of several starts on, one point at a time is moved next to another and D minimized anew; what is better is kept.

    python -m training.gaussian_grids --out flute/data/gaussian_grids.json
    python -m training.gaussian_grids --check flute/data/gaussian_grids.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

REACH = 5.6  # beyond it lies less than 5e-8 of the mass, which counts as an atom's of its own
COARSE, FINE = 0.04, 0.01  # sides of the squares while searching and while polishing
STARTS = {2: 16, 3: 8, 4: 3}
MOVES = {2: 16, 3: 60, 4: 50}


def _cells(edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass and mean of a standard normal variable between neighbouring ``edges`` (n + 1,), float64: (n,), (n,)."""
    below = 0.5 * torch.erfc(-edges / math.sqrt(2))
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    mass = below.diff()
    return mass, -density.diff() / mass


def line_grid(bits: int, rounds: int = 20000) -> torch.Tensor:
    """The optimal grid of 2**bits points on the line, float64, ascending and symmetric."""
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    grid = torch.linspace(-2, 2, 1 << bits, dtype=torch.float64)
    for _ in range(rounds):
        _, grid = _cells(torch.cat((-infinity, (grid[1:] + grid[:-1]) / 2, infinity)))
        grid = (grid - grid.flip(0)) / 2
    return grid


def line_distortion(grid: torch.Tensor) -> float:
    """D of a grid (n,) on the line, in closed form; the grid need not be optimal."""
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    mass, mean = _cells(torch.cat((-infinity, (grid[1:] + grid[:-1]) / 2, infinity)))
    return float(1 + (mass * (grid.square() - 2 * grid * mean)).sum())


def atoms(side: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass (m,) and mean (m, 2) of every square of the plane, float64."""
    inner = torch.arange(round(2 * REACH / side) + 1, dtype=torch.float64) * side - REACH
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    mass, mean = _cells(torch.cat((-infinity, inner, infinity)))
    return torch.outer(mass, mass).flatten(), torch.cartesian_prod(mean, mean)


def nearest(points: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Index (m,) of the grid point nearest to each point (m, 2)."""
    norms = grid.square().sum(1)
    return torch.cat([torch.addmm(norms, part, grid.T, alpha=-2).argmin(1) for part in points.split(1 << 15)])


def plane_distortion(grid: torch.Tensor, side: float = FINE) -> float:
    """D of a grid (n, 2), per dimension: atoms to their nearest points, plus what atoms hold inside of them."""
    mass, mean = atoms(side)
    between = mass * (mean - grid[nearest(mean, grid)]).square().sum(1)
    inside = 2 - (mass * mean.square().sum(1)).sum()
    return float(between.sum() + inside) / 2


def _search(grid: torch.Tensor, mass: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The local minimum below ``grid``."""
    grid = grid.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([grid], max_iter=200, max_eval=400, history_size=30,
                                  tolerance_grad=0, tolerance_change=1e-13, line_search_fn="strong_wolfe")  # fmt: skip

    def distortion() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (mass * (mean - grid[nearest(mean, grid.detach())]).square().sum(1)).sum()
        loss.backward()
        return loss

    optimizer.step(distortion)
    return grid.detach()


def plane_grid(bits: int) -> torch.Tensor:
    """The best grid found of 2**(2*bits) points in the plane, float64, rows in lexicographic order."""
    count, coarse, generator = 1 << (2 * bits), atoms(COARSE), torch.Generator().manual_seed(bits)
    best, least = torch.empty(0), math.inf
    for step in range(STARTS[bits] + MOVES[bits]):
        if step < STARTS[bits]:
            # Zador: points of an optimal grid lie as phi^(1/2) does, a normal distribution of variance 2
            begin = torch.randn(count, 2, dtype=torch.float64, generator=generator) * math.sqrt(2 - 4 / count**0.5)
        else:
            moved, beside = torch.randperm(count, generator=generator)[:2]
            begin = best.clone()
            begin[moved] = best[beside] + 0.1 * torch.randn(2, dtype=torch.float64, generator=generator)
        grid = _search(begin, *coarse)
        found = plane_distortion(grid, COARSE)
        if found < least:
            best, least = grid, found
            print(f"n={count} step {step}: D={found:.6f}", flush=True)
    best = _search(best, *atoms(FINE))
    order = sorted(range(count), key=lambda row: tuple(best[row].tolist()))
    return best[order]


def report(tables: dict[str, list]) -> None:
    """Print D of every table as it is stored."""
    for name, values in tables.items():
        grid = torch.tensor(values, dtype=torch.float64)
        found = line_distortion(grid) if grid.dim() == 1 else plane_distortion(grid)
        print(f"{name}: n={len(grid)}, D={found:.6f}")


def main() -> None:
    """Write or check the file of tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", type=Path)
    options = parser.parse_args()
    if options.out:
        grids = {f"gauss{bits}": line_grid(bits) for bits in (2, 3, 4)}
        grids |= {f"gausspair{bits}": plane_grid(bits) for bits in (2, 3, 4)}
        tables = {name: grid.float().tolist() for name, grid in grids.items()}
        lines = ",\n".join(f'"{name}": {json.dumps(values)}' for name, values in tables.items())
        options.out.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        report(tables)
    if options.check:
        report(json.loads(options.check.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
