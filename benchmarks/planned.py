"""What ``dino plan`` says of memory and speed, and what runs of 60 steps then take: three sizes.

    python benchmarks/planned.py

Each in processes of their own, one after the other. Peak memory is the largest resident memory of the process.
"""

import json
import resource
import subprocess
import sys
import tempfile

from side_by_side import save

SIZES: dict[str, list[str]] = {
    "nano": ["shapes:2000x48", "--recipe", "demo"],
    "tiny": ["shapes:2000x96", "--model.backbone", "vit_tiny", "--model.patch-size", "8", "--optim.batch-size", "32"],
    "small": ["shapes:400x224", "--recipe", "vits16_vanilla_100ep", "--optim.batch-size", "8"],
}
FEW = [
    "--optim.length",
    "60 steps",
    "--optim.warmup",
    "0 steps",
    "--run.knn-every",
    "0 epochs",
    "--data.val-fraction",
    "0",
]


def peak_of_children() -> float:
    """In GiB, of the largest child so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def real(arguments: list[str]) -> dict[str, float]:
    """Run by a process of its own, whose only child is the run: the largest child is that one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dino", "pretrain", *arguments, "--out", f"{folder}/run", "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(f"{folder}/run/metrics.jsonl") as lines:
            speeds = [json.loads(line).get("images_per_second") for line in lines]
    known = sorted(speed for speed in speeds[1:] if speed)
    return {"peak_gib": peak_of_children(), "images_per_second": known[len(known) // 2]}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(real(json.loads(sys.argv[1]))))
        return
    results = {}
    for name, arguments in SIZES.items():
        planned = subprocess.run(
            [sys.executable, "-m", "dino", "plan", *arguments, *FEW, "--json"],
            check=True,
            capture_output=True,
            text=True,
        )
        took = subprocess.run(
            [sys.executable, __file__, json.dumps([*arguments, *FEW])], check=True, capture_output=True, text=True
        )
        plan, run = json.loads(planned.stdout.splitlines()[-1]), json.loads(took.stdout.splitlines()[-1])
        results[name] = {
            "planned_gib": round(plan["peak_memory_gib"], 3),
            "run_gib": round(run["peak_gib"], 3),
            "memory_ratio": round(plan["peak_memory_gib"] / run["peak_gib"], 3),
            "speed_ratio": round(plan["images_per_second"] / run["images_per_second"], 3),
        }
        print(name, results[name], flush=True)
    save("planned", {"sizes": results, "flags": SIZES}, "cpu")


if __name__ == "__main__":
    main()
