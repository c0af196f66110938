"""bench/results/<card>.json: its name, the hash of the sources, reading, writing and merging. Needs no torch."""

import hashlib
import json
import re
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SOURCE_FOLDERS = ("csrc", "moe_kernels")
NOT_SOURCE = {".so", ".pyc", ".pyd", ".o", ".a", ".bin"}
ROW_KEY = ("shape", "num_tokens", "pass", "dtype", "routing", "impl")


def slug(card):
    """The file name of a card: "NVIDIA H100 80GB HBM3" gives "h100", "NVIDIA GeForce RTX 4090" gives "rtx-4090"."""
    words = re.sub(r"[^a-z0-9]+", " ", card.lower()).split()
    words = [word for word in words if word not in ("nvidia", "geforce", "tesla", "quadro")] or ["unknown"]
    count = 1 if any(character.isdigit() for character in words[0]) else 2
    return "-".join(words[:count])


def is_source(path):
    """Whether a file counts for the hash: no binary, no cache, nothing hidden."""
    parts = path.parts
    return path.suffix not in NOT_SOURCE and not any(
        part.startswith(".") or part in ("__pycache__", "build") or part.endswith(".egg-info") for part in parts)


def source_hash(root=ROOT):
    """A hash of the relative paths and contents of the files of csrc/ and moe_kernels/, in sorted order."""
    digest = hashlib.sha256()
    root = Path(root)
    for folder in SOURCE_FOLDERS:
        files = [path.relative_to(root) for path in (root / folder).rglob("*") if path.is_file()]
        for path in sorted((path for path in files if is_source(path)), key=lambda path: path.as_posix()):
            content = (root / path).read_bytes()
            digest.update(f"{path.as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def read_all(results=RESULTS):
    """The results files of a folder, by file name: list of (path, content)."""
    return [(path, json.loads(path.read_text())) for path in sorted(Path(results).glob("*.json"))]


def write(path, content):
    """Writes a results file: a line a row, so that a diff shows which rows changed."""
    rows = ",\n  ".join(json.dumps(row) for row in content["results"])
    head = json.dumps({name: value for name, value in content.items() if name != "results"}, indent=1)
    head = re.sub(r"\[[-\d.,\s]+\]", lambda numbers: " ".join(numbers[0].split()), head)  # a curve is one line
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.part")
    temporary.write_text(f'{head[:-2]},\n "results": [\n  {rows}\n ]\n}}\n')
    temporary.replace(path)


def merge(previous, current):
    """The rows, models and training of a run, and what an earlier run on the same sources and card has beside them."""
    same = (previous is not None and previous["source_hash"] == current["source_hash"]
            and previous["card"] == current["card"])
    if not same:
        return current
    case = ROW_KEY[:-1]  # all its implementations are of one run, else their ratios would be of two
    measured = {tuple(row[name] for name in case) for row in current["results"]}
    kept = [row for row in previous["results"] if tuple(row[name] for name in case) not in measured]
    other = {name: current.get(name) or previous.get(name) for name in ("tests", "models", "training")}
    if not current["results"]:  # models or training alone: the rows were measured under the earlier run's limits
        other |= {name: previous[name] for name in ("limits", "date")}
        other["failures"] = previous["failures"] + current["failures"]
    other["versions"] = {**previous["versions"], **current["versions"]}
    return {**current, **other, "results": kept + current["results"]}


def tests_from_text(text):
    """{"passed", "failed", "skipped"} of "812,0,3"."""
    counts = text.split(",")
    if len(counts) != 3 or not all(count.strip().isdigit() for count in counts):
        raise ValueError(f"--tests wants PASSED,FAILED,SKIPPED such as 812,0,3, got {text}")
    return dict(zip(("passed", "failed", "skipped"), map(int, counts)))


def tests_from_junit(path):
    """{"passed", "failed", "skipped"} of a file that `pytest --junit-xml` wrote."""
    suites = list(xml.etree.ElementTree.parse(path).getroot().iter("testsuite"))
    total, failures, errors, skipped = (sum(int(suite.get(name, 0)) for suite in suites)
                                        for name in ("tests", "failures", "errors", "skipped"))
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}
