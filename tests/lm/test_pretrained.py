"""A pretrained model is identified by its content."""

import hashlib
import shutil
from pathlib import Path

from saelab.lm.pretrained import fingerprint
from tests.tiny import model_folder


def test_the_fingerprint_of_a_model_depends_on_its_content_and_not_on_its_folder(tmp_path: Path) -> None:
    folder = model_folder("gpt2")
    copied = Path(shutil.copytree(folder, tmp_path / "checkpoints" / "snapshots" / "last"))
    assert fingerprint(copied) == fingerprint(folder)
    weights = copied / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(copied) != fingerprint(folder)


def test_the_fingerprint_of_a_large_file_is_taken_from_its_name_in_the_hubs_cache(tmp_path: Path) -> None:
    folder, cached = model_folder("gpt2"), tmp_path / "models--someone--model"
    snapshot, blobs = cached / "snapshots" / "a94a8fe5", cached / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():  # as the Hub's client stores them: small files have another kind of name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        blob = blobs / (digest if path.suffix == ".safetensors" else digest[:40])
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    assert fingerprint(snapshot) == fingerprint(folder)
    (snapshot / "model.safetensors").resolve().write_bytes(b"never read")
    assert fingerprint(snapshot) == fingerprint(folder)
