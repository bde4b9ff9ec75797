"""The bundle as one archive in the layout of MONAI's model zoo."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from bundle.cli import ROOT, TRAINED_WITH
from bundle.config import merge_overlays
from bundle.errors import UserError, exit_in_one_line
from bundle.files import replacing
from bundle.networks import load_weights, read_novelty

NAME = "chest_ct_multitask"
PARTS = ("LICENSE", "bundle", "configs", "docs", "models")
WEIGHTS = "models/model.pt"
LIMIT = 25_000_000  # bytes of a file: the model zoo takes no larger one
WITH_NETWORK = ("configs/inference.json", "configs/train.json")


def package_bundle(output_dir, root=ROOT, checkpoint=None, overlays: Sequence = (), url: str | None = None) -> Path:
    """Write `chest_ct_multitask_v{version}.zip`: one folder with LICENSE, configs, models, docs and the code.

    Of a git checkout it holds what git tracks, as it lies there. The same files give the same archive, byte for byte. Files
    above `LIMIT` stay out; `large_files.yml` says where `monai.bundle download_large_files` finds them.

    Args:
        output_dir: folder of the archive, made if missing.
        root: of the bundle.
        checkpoint: weights instead of those in models/; a reference.pt beside them goes along.
        overlays: config files merged into inference.json and train.json, so that these describe the network of the weights.
        url: address below which the large files are found, by their paths in the bundle.

    Returns:
        Path of the archive.

    Raises:
        UserError: without weights.
        UserError: if they do not fit inference.json, a reference.pt beside them was made for others, or a file is too large
            and there is no `url`.
    """
    root, files = Path(root), bundle_files(Path(root))
    if not checkpoint and WEIGHTS not in files:
        raise UserError(
            f"{root / WEIGHTS}: found no such file that belongs to the bundle, expected weights that git tracks; train, or "
            "name a checkpoint"
        )
    weights = Path(checkpoint or root / WEIGHTS)
    reference = weights.with_name("reference.pt")
    check_weights(weights, merge_overlays(root / "configs/inference.json", overlays))
    read_novelty(reference, weights)
    contents = {path: (root / path).read_bytes() for path in files if not (checkpoint and path.startswith("models/"))}
    if checkpoint:
        contents[WEIGHTS] = weights.read_bytes()
        contents |= {"models/reference.pt": reference.read_bytes()} if reference.is_file() else {}
    for path in WITH_NETWORK if overlays else ():
        contents[path] = json.dumps(merge(json.loads(contents[path]), overlays), indent=4).encode() + b"\n"
    large = {path: contents.pop(path) for path in sorted(contents) if len(contents[path]) > LIMIT}
    if large and url is None:
        path, size = next((path, len(content) / 1e6) for path, content in large.items())
        raise UserError(
            f"{path}: found {size:.1f} MB, expected at most {LIMIT / 1e6:.0f}; say with url where it will be found"
        )
    if large:
        contents["large_files.yml"] = large_files(large, url)
    version = json.loads(contents["configs/metadata.json"])["version"]
    archive = Path(output_dir) / f"{NAME}_v{version}.zip"
    write_zip(archive, {f"{NAME}/{path}": content for path, content in contents.items()})
    return archive


def bundle_files(root: Path) -> list[str]:
    """Paths below the root that belong into an archive: what git tracks, or without git everything but caches."""
    if (root / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z", "--", *PARTS], cwd=root, capture_output=True, text=True)
        if listed.returncode:
            raise UserError(f"{root}: found a checkout that git cannot list ({' '.join(listed.stderr.split())})")
        return sorted(filter(None, listed.stdout.split("\0")))
    found = [path for part in PARTS for path in (root / part, *(root / part).rglob("*")) if path.is_file()]
    paths = sorted(path.relative_to(root) for path in found)
    return [path.as_posix() for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts)]


def check_weights(checkpoint, config: Mapping) -> None:
    """Refuse weights that do not answer every task of the network that a config describes, and a network it cannot make.

    Raises:
        FileNotFoundError, ValueError: of `bundle.networks.load_weights`.
    """
    parser = ConfigParser(dict(config))
    load_weights(parser.get_parsed_content("multitask_net"), checkpoint, strict=True)
    parser.get_parsed_content("network")


def merge(config: Mapping, overlays: Sequence) -> dict:
    """A config with overlays merged in as MONAI does it, but only what concerns an id that it has."""
    parser = ConfigParser(dict(config))
    for overlay in overlays:
        for key, value in ConfigParser.load_config_file(overlay).items():
            if re.split("::|#", key.removeprefix("+"))[0] in config:
                merge_kv(parser, key, value)
    return {key: value for key, value in parser.get().items() if key in config}


def large_files(contents: Mapping[str, bytes], url: str) -> bytes:
    """List of large files as MONAI reads it, in YAML."""
    lines = ["large_files:"]
    for path, content in contents.items():
        entry = {"url": f"{url.rstrip('/')}/{path}", "hash_val": hashlib.sha256(content).hexdigest(), "hash_type": "sha256"}
        lines += [f"  - path: {json.dumps(path)}", *(f"    {key}: {json.dumps(value)}" for key, value in entry.items())]
    return "\n".join([*lines, ""]).encode()


def write_zip(archive: Path, contents: Mapping[str, bytes]) -> None:
    """Write files in the order of their names, without their times."""
    with replacing(archive) as temporary, ZipFile(temporary, "w") as file:
        for path in sorted(contents):
            entry = ZipInfo(path)  # of 1980
            entry.compress_type, entry.create_system, entry.external_attr = ZIP_DEFLATED, 3, 0o100644 << 16
            file.writestr(entry, contents[path])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of scripts/package_bundle.py."""
    parser = argparse.ArgumentParser(description=f"Write {NAME}_vX.Y.Z.zip, the bundle in the layout of MONAI's model zoo.")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="folder of the archive")
    parser.add_argument("--checkpoint", metavar="FILE", help=f"weights to put in; default: {WEIGHTS} of the bundle")
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="overlay with the network of the weights, merged into inference.json and train.json of the archive; default: "
        f"that of {WEIGHTS} without --checkpoint, none with it",
    )
    parser.add_argument("--url", metavar="BASE", help="files over 25 MB stay out and will be found at BASE/models/model.pt …")
    known = parser.parse_args(arguments)
    overlays = known.config or ([] if known.checkpoint else [ROOT / TRAINED_WITH])
    with exit_in_one_line():
        print(package_bundle(known.output_dir, ROOT, known.checkpoint, overlays, known.url))


if __name__ == "__main__":
    main()
