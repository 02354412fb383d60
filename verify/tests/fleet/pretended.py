"""A run on a GPU that is not there: ``python -m verify.tests.fleet.pretended TARGET SECONDS PIDS --out DIR``.

It logs as a run does, and leaves the record of a run that passed, and its process id in the folder PIDS. Fleet runs in
tests give it to nodes instead of ``verify run``; the command line cannot.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from verify.checks import catalogue
from verify.record.reading import write_record
from verify.run.events import EVENTS, MANIFEST, RECORD
from verify.tests.rehearsal import made


def main(target: str, seconds: float, pids: Path, out: Path) -> None:
    (pids / f"{target}-{os.getpid()}").touch()
    record = made(target, 1, {}, list(catalogue())).model_copy(update={"rehearsal": False})
    run = out / record.run_id
    run.mkdir(parents=True)
    ids = [one.id for one in record.results]
    (run / MANIFEST).write_text(json.dumps({"selected": ids}))
    for number, one in enumerate(ids):
        with (run / EVENTS).open("a") as log:
            log.write(json.dumps({"event": "start", "id": one}) + "\n")
            log.write(json.dumps({"event": "result", "result": {"id": one}}) + "\n")
        if number % 50 == 0:
            time.sleep(seconds / (len(ids) // 50 + 1))
    (run / MANIFEST).unlink()
    (run / EVENTS).unlink()
    write_record(record, run / RECORD)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[5]))
