"""How long a fresh process takes until the demo's bundle has classified its first image, beyond `import onnxruntime`.

Processes of both kinds take turns, with the files in the page cache.
"""

import json
import statistics
import subprocess
import sys
import time

from PIL import Image

ROUNDS = 7
MOST_SECONDS = 1.0

LIBRARY = "import onnxruntime"
FIRST_PREDICTION = """
import json, sys, time
import onnxruntime
clock = [time.perf_counter()]
from fastfsl.runtime import Classifier
clock.append(time.perf_counter())
classifier = Classifier.load(sys.argv[1], device="cpu")
clock.append(time.perf_counter())
classifier.predict(sys.argv[2])
clock.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(clock, clock[1:])]))
"""


def _process(code: str, *arguments: object) -> tuple[float, str]:
    """Seconds from start to end of a process, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return time.perf_counter() - start, done.stdout


def bench_cold_start(benchmark, record, demo, tmp_path):
    photo = tmp_path / "photo.png"
    Image.radial_gradient("L").save(photo)
    library, whole, stages = [], [], []

    def rounds():
        for round_number in range(ROUNDS + 1):
            seconds = _process(LIBRARY)[0]
            total, printed = _process(FIRST_PREDICTION, demo.folder / "bundle", photo)
            if round_number:  # the first round fills the page cache
                library.append(seconds)
                whole.append(total)
                stages.append(json.loads(printed))

    benchmark.pedantic(rounds, rounds=1)
    beyond = statistics.median(total - seconds for total, seconds in zip(whole, library, strict=True))
    imported, loaded, predicted = (statistics.median(column) for column in zip(*stages, strict=True))
    result = {
        "what": "the demo's bundle, medians over fresh processes, in seconds",
        "rounds": ROUNDS,
        "import_onnxruntime_process": round(statistics.median(library), 3),
        "beyond_it": round(beyond, 3),
        "import_runtime": round(imported, 3),
        "load": round(loaded, 3),
        "first_prediction": round(predicted, 3),
    }
    record("cold_start", result)
    assert beyond <= MOST_SECONDS, result
