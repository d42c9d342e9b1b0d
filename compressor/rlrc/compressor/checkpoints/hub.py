"""Checkpoints on the Hugging Face hub: downloads the configuration, weights and tokenizer of a repository once."""

from __future__ import annotations

from pathlib import Path

from rlrc.checkpoint_folder import REPOSITORY, checkpoint_folder
from rlrc.errors import UserError

# No *.py, optimizer states or other formats of the same weights; NOT_NEEDED excludes subfolders.
NEEDED = ["*.json", "*.safetensors", "*--*checkpoint.pt", "tokenizer.model"]
NOT_NEEDED = ["*/*"]


def locate(given: str | Path) -> Path:
    """The policy's folder at the path if that exists; else the snapshot of the repository ``owner/name[@revision]``.

    Downloads with a progress bar and resumes an interrupted download. Raises UserError if there is neither.
    """
    path, match = Path(given), REPOSITORY.fullmatch(str(given))
    if path.exists() or path.is_symlink() or match is None:
        return checkpoint_folder(path)  # open_folder reports what is missing
    try:
        from huggingface_hub import errors, snapshot_download
    except ModuleNotFoundError:
        raise UserError(
            f"expected a folder at {path}, found nothing; check the path (a repository of the hub needs "
            "pip install 'rlrc[compress]')"
        ) from None

    name, revision = match["name"], match["revision"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED, ignore_patterns=NOT_NEEDED))
    except errors.GatedRepoError:
        raise UserError(
            f"expected access to {name} on the hub, found that its owner grants it on request; ask at "
            f"https://huggingface.co/{name} and run hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"expected the revision {revision} of {name} on the hub, found none; see its branches"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"expected a folder or a repository of the hub with the name {name}, found neither; check the spelling "
            "(and run hf auth login if it is private)"
        ) from None
    except errors.HFValidationError:
        raise UserError(f"expected a folder at {path}, found nothing; check the path") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"expected a folder at {path} or a connection to the hub to get {name}, found neither; check the path, or "
            "download it on a machine with a connection and use that folder"
        ) from None
    except OSError as error:  # the disk, or the hub's other answers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"expected to download {name} from the hub, found: {reason}; run again to resume") from None
