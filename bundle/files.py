"""Files that are there as a whole or not at all, and manifests of what this package has written into a folder."""

import csv
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from bundle.errors import UserError

PACKAGE = Path(__file__).parent
# Folder of configs/ and models/: inside the installed package, or the checkout that the package lies in.
ROOT = PACKAGE / "_root" if (PACKAGE / "_root").is_dir() else PACKAGE.parent
MANIFEST = "manifest.txt"
_listing: set[str] = set()  # absolute folders whose files are being listed


@contextmanager
def replacing(path) -> Iterator[Path]:
    """Yield the path of a temporary file, which is renamed to `path` when the block ends and removed if it fails.

    An OSError (a full disk, a folder that is read-only, a name that is too long) becomes a UserError.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        yield temporary
        list_file(path)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # of a disk that has gone away: the first error says more
                temporary.unlink(missing_ok=True)


def unwritable(path, error: OSError) -> UserError:
    """What a user reads of a file or folder that cannot be written."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); check the disk and its permissions")


@contextmanager
def locked(folder) -> Iterator[None]:
    """Keep a folder for this process while the block runs, by a lock on the file .lock in it; it is made if missing.

    If another process has it, a UserError names that one.
    """
    folder = Path(folder)
    lock, holder = FileLock(folder / ".lock"), folder / ".lock.holder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        who = "another process"
        with suppress(OSError):  # it has only begun, or just ended
            who = holder.read_text(encoding="utf-8")
        raise UserError(f"{folder}: in use by {who}; wait for its end, or set another folder") from None
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}", holder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def list_files(folder) -> None:
    """List every file that this process writes below a folder in its `manifest.txt`, before it is written."""
    list_file(Path(folder, MANIFEST))  # in those of the folders above
    _listing.add(os.path.abspath(folder))


def stop_listing(folder) -> None:
    _listing.discard(os.path.abspath(folder))


def list_file(path) -> None:
    """Add a file to the manifests of all folders above it that are being listed."""
    for folder in _listing:
        name = os.path.relpath(path, folder)
        if Path(name).parts[0] != os.pardir and name not in listed_files(folder):
            with Path(folder, MANIFEST).open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{name}\n")


def listed_files(folder) -> list[str]:
    """Read the manifest of a folder: relative paths."""
    manifest = Path(folder, MANIFEST)
    return manifest.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if manifest.exists() else []


def remove_listed_files(folder) -> None:
    """Remove the files of a folder's manifest, folders that are empty then, and the manifest."""
    places = {Path(folder, name) for name in listed_files(folder) if os.pardir not in Path(name).parts}
    for path in places:
        with suppress(OSError):  # it is gone, or a folder by now
            path.unlink()
    for place in sorted({parent for path in places for parent in path.parents}, key=lambda p: len(p.parts), reverse=True):
        if Path(folder) in place.parents:
            with suppress(OSError):  # it holds something of the user
                place.rmdir()
    Path(folder, MANIFEST).unlink(missing_ok=True)


def write_text(text: str, path) -> None:
    """Write a text in UTF-8; bytes of a file's name that are not UTF-8 become escapes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(content, path) -> None:
    write_text(json.dumps(content, indent=1) + "\n", path)


def write_table(rows: Iterable[Mapping], path, columns: Sequence[str] = ()) -> None:
    """Write rows (column -> value) as CSV in UTF-8; `columns` come first, whether or not a row has them."""
    rows = list(rows)
    columns = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    how = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with replacing(path) as temporary, temporary.open("w", **how) as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_checkpoint(content, path) -> None:
    """Write what torch.save takes; the same content gives the same bytes."""
    import torch  # takes seconds, which `chestct --help` need not wait for

    with replacing(path) as temporary, temporary.open("wb") as file:  # to a path, its name is in the archive
        torch.save(content, file)


def write_figure(figure, path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def text_hash(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path) -> str:
    """SHA-256 of a file; empty if there is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


def log_artifacts(engine, paths: Iterable[Path]) -> None:
    """Keep those files that exist with the run of an engine that MLflow tracks; MONAI's handler keeps no pictures."""
    from monai.handlers import MLFlowHandler  # takes seconds, which those who only write need not wait for

    handlers = {handler for handlers in engine._event_handlers.values() for handler, *_ in handlers}
    for tracker in {getattr(handler, "__self__", None) for handler in handlers}:
        if isinstance(tracker, MLFlowHandler):
            for path in filter(Path.is_file, paths):
                tracker.client.log_artifact(tracker.cur_run.info.run_id, str(path))
