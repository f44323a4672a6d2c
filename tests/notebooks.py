"Notebooks and package in step, and every cell of the library notebooks runs."

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
PRELOADED = ["torch", "torchvision", "timm", "pandas", "seaborn", "sklearn.linear_model", "nbdev.test"]


def files(folder: Path) -> dict[str, bytes]:
    "Content of notebooks and package."
    found = [p for kind in ("nbs/**/*.ipynb", "aigid_repro/**/*.py") for p in folder.glob(kind)]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found if ".ipynb_checkpoints" not in p.parts}


def out_of_step() -> list[str]:
    "Files that export or clean would change, found in a copy so that the checkout stays as it is."
    with tempfile.TemporaryDirectory() as d:
        for name in ("nbs", "aigid_repro"):
            skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(ROOT / name, Path(d) / name, ignore=skip)
        for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / name, d)
        before = files(Path(d))
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run([Path(sys.executable).parent / command], cwd=d, check=True)
        after = files(Path(d))
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def is_library(path: Path) -> bool:
    "Experiment notebooks belong to the runner; library notebooks are numbered or stand at the top."
    return (path.parent == ROOT / "nbs" or path.name[0].isdigit()) and ".ipynb_checkpoints" not in path.parts


def main() -> int:
    if changed := out_of_step():
        for name in changed: print(f"out of step: {name}")
        print("run .venv/bin/nbdev_export and .venv/bin/nbdev_clean, then commit what they change")
        return 1
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ[name] = "1"
    os.environ["MPLBACKEND"] = "agg"
    # two notebooks run side by side; a pool of processes in one of them would be waited for when its process ends
    os.environ["AIGID_JOBS"] = "1"
    notebooks = sorted(p for p in (ROOT / "nbs").glob("**/*.ipynb") if is_library(p))
    # the long ones first, so that the two processes end together
    notebooks.sort(key=lambda p: not re.search(r"\btorch\b", p.read_text(encoding="utf8")))
    from nbdev.config import get_config
    from nbdev.test import test_nb
    skip = get_config(path=ROOT).tst_flags.split()
    # Each notebook has a process of its own: what a notebook changes in the package (it registers its own copy of a
    # detector, say) must not meet the next one. Libraries are imported once, and every process starts as a copy of that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def passes(path: Path) -> bool:
        # the process is handed nbdev's function, not one of this file: a notebook takes the name __main__ there
        with ProcessPoolExecutor(1, mp_context=context, initializer=os.chdir, initargs=(ROOT / "nbs",)) as pool:
            try: return pool.submit(test_nb, path, skip, basepath=ROOT).result()[0]
            except BrokenProcessPool:
                print(f"{path.name}: its process was killed; see whether memory is short")
                return False

    with ThreadPoolExecutor(WORKERS) as threads:
        results = [(path.relative_to(ROOT).as_posix(), passed) for path, passed in zip(notebooks, threads.map(passes, notebooks))]
    for name, passed in results:
        if not passed: print(f"FAILED {name}")
    failed = sum(not passed for _, passed in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
