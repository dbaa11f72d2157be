"""Nearest neighbours of 5,000 features among 50,000: ours, scikit-learn's brute force, and faiss's flat index.

    python benchmarks/knn.py [--device cuda] [--runs 7] [--k 20 200] [--threads 1]

Every contender runs in a process of its own, one after the other, A B C A B C. Timed is what an evaluation waits for:
from two arrays in memory to the similarities (or distances) and indices of the k nearest, with an index built where the
contender has one. On a machine that others use too, the CPU time of one thread is what can be compared. faiss is
optional: ``pip install faiss-cpu``.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
CONTENDERS = {"dino": "torch", "scikit-learn": "scikit-learn", "faiss": "faiss-cpu"}  # And whose version is noted.


def make_features(count: int, dim: int, seed: int) -> np.ndarray:
    """Rows of length 1 around 1,000 centres: neighbours are neither all alike nor all different."""
    centers = np.random.default_rng(0).standard_normal((1000, dim), dtype=np.float32)
    generator = np.random.default_rng(seed)
    features = centers[generator.integers(0, 1000, count)] + generator.standard_normal((count, dim), dtype=np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def prepare(contender: str, device: str) -> Any:
    """``search(bank, queries, k) -> indices``, with everything imported."""
    if contender == "dino":
        import torch

        from dino.encoder.neighbors import nearest_neighbors

        def search(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
            on_device = [torch.from_numpy(array).to(device) for array in (queries, bank)]
            return nearest_neighbors(on_device[0], on_device[1], k)[1].cpu().numpy()

    elif contender == "faiss":
        import faiss  # pyright: ignore[reportMissingImports]

        def search(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
            index = faiss.IndexFlatIP(bank.shape[1])
            index.add(bank)
            return index.search(queries, k)[1]

    else:
        from sklearn.neighbors import NearestNeighbors

        def search(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
            # For features of length 1 the Euclidean order is that of the cosine, and scikit-learn's faster one.
            index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean").fit(bank)
            return index.kneighbors(queries)[1]

    return search


def peak_mib(since_now: bool = False) -> float:
    """Largest resident memory of this process, so far or from now on (where the system can start counting anew)."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
    if since_now:
        Path("/proc/self/clear_refs").write_text("5")
    # getrusage would count what the parent process had.
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10


def run_one(contender: str, device: str, k: int, folder: Path) -> None:
    """In its own process: prints seconds and memory, and leaves the indices."""
    bank, queries = np.load(folder / "bank.npy"), np.load(folder / "queries.npy")
    search = prepare(contender, device)
    search(bank[:1000], queries[:100], k)  # Threads start, kernels are chosen.
    before = peak_mib(since_now=True)
    start, cpu_start = time.perf_counter(), time.process_time()
    indices = search(bank, queries, k)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    np.save(folder / f"{contender}-{k}.npy", indices)
    memory = {"peak_mib": peak_mib(), "added_mib": peak_mib() - before}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, **memory}))


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the neighbours that both found, in whatever order."""
    return float(np.mean([len(np.intersect1d(x, y)) / len(x) for x, y in zip(a, b, strict=True)]))


def hardware(device: str) -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "load": round(os.getloadavg()[0], 2)}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    present = [name for name in CONTENDERS if name != "faiss" or importlib.util.find_spec("faiss")]
    if "faiss" not in present:
        print("faiss is not installed and left out: pip install faiss-cpu", file=sys.stderr)
    sizes = {"bank": args.bank, "queries": args.queries, "dim": args.dim}
    results: dict[str, Any] = {
        "sizes": sizes,
        "runs": args.runs,
        "threads": args.threads or os.cpu_count(),
        "device": args.device,
        "hardware": hardware(args.device),
        "versions": {"python": platform.python_version(), **{CONTENDERS[n]: version(CONTENDERS[n]) for n in present}},
        "k": {},
    }
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    environment = {**os.environ, **(limits if args.threads else {})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "bank.npy", make_features(args.bank, args.dim, 1))
        np.save(folder / "queries.npy", make_features(args.queries, args.dim, 2))
        for k in args.k:
            runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in present}
            for _ in range(args.runs):
                for contender in present:
                    command = [sys.executable, __file__, "--one", contender, "--device", args.device, "--k", str(k)]
                    command += ["--folder", name]
                    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                    if done.returncode:
                        raise SystemExit(f"{contender} failed: {done.stderr.strip()}")
                    runs[contender].append(json.loads(done.stdout.splitlines()[-1]))
            found = {contender: np.load(folder / f"{contender}-{k}.npy") for contender in present}
            medians = {c: {key: statistics.median(run[key] for run in runs[c]) for key in runs[c][0]} for c in present}
            results["k"][str(k)] = {
                contender: {
                    **{key: round(value, 4) for key, value in medians[contender].items()},
                    "fastest": round(min(run["seconds"] for run in runs[contender]), 4),
                    "slowest": round(max(run["seconds"] for run in runs[contender]), 4),
                    "times_of_dino": round(medians[contender]["seconds"] / medians["dino"]["seconds"], 3),
                    "same_neighbors": round(agreement(found[contender], found["dino"]), 6),
                }
                for contender in present
            }
    return results


def show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    sizes, machine = results["sizes"], results["hardware"]
    title = f"{sizes['queries']:,} queries, {sizes['bank']:,} x {sizes['dim']}, median of {results['runs']} runs"
    table = Table(
        "k", "who", "seconds", "(range)", "x dino", "CPU s", "peak MiB", "added MiB", "same neighbours", title=title
    )
    for k, contenders in results["k"].items():
        for name, row in contenders.items():
            span = f"{row['fastest']:.2f}-{row['slowest']:.2f}"
            used = f"{row['cpu_seconds']:.2f}", f"{row['peak_mib']:.0f}", f"{row['added_mib']:.0f}"
            same = f"{row['same_neighbors']:.5f}"
            table.add_row(k, name, f"{row['seconds']:.3f}", span, f"{row['times_of_dino']:.2f}", *used, same)
    console = Console()
    console.print(table)
    console.print(f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}; {results['versions']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of dino; the others use the CPU")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--k", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--threads", type=int, default=0, help="of every contender; 0: what each takes by itself")
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args.one, args.device, args.k[0], args.folder)
        return
    results = compare(args)
    show(results)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"knn-{args.device}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
