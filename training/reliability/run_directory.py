"""A run's directory: what it may hold, which process holds it, and how a run replaces another.

    <run>/.lock        host and process of the run, and a random token; the lock ends with the process
    <run>/.replaced/   under overwrite=true: the previous run, until the new one has started

Only rank 0 writes here, except for checkpoints and stacks. Nothing is written through a link.
"""

import errno
import fcntl
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

import yaml

from data.files import entries, read_regular, sync_directory
from training import records
from training.config import ConfigurationError, RunConfig, RunHeldError

LOCK_FILE = ".lock"
REPLACED = ".replaced"
DISCARDED = ".discarded-"  # a replaced run while it is being deleted

# What a run killed during start-up may leave. NFS keeps an open file that was deleted as .nfs…
_HIDDEN: dict[str, str | None] = {r"\.lock|\.replaced|\.discarded-\w+|\..+\.partial|\.nfs.+": None}
#: Every name that a run writes, as patterns; for a directory with the names inside it (None: any).
OWN_NAMES: dict[str, str | None] = {
    r"config\.yaml|environment\.json|summary\.json|metrics(\.cut-\d+)?\.jsonl": None,
    "checkpoints": r"(superseded-)?step-\d{8,}|\.step-\d{8,}\.(partial|discarded)",
    "exports": r"step-\d{8,}|\.step-\d{8,}\.\d+\.(partial|replaced)",
    "stacks": r"rank-\d{5}\.txt",
    "profile": r"trace\.json|table\.txt|\..+\.partial",
    "tensorboard|wandb": None,
    **_HIDDEN,
}


def refuse_absent(path: Path) -> None:
    """Raise ConfigurationError for a path that is not a directory."""
    if not path.is_dir():
        raise ConfigurationError(f"{path}: no such directory; give a run, runs/<name>, or a checkpoint of one")


def is_run(directory: Path) -> bool:
    """Return whether the directory's config.yaml is a run's: a mapping with a run's sections, of any version.

    Raises OSError if the file cannot be read.
    """
    path = directory / records.CONFIG_FILE
    sections = {name for name, field in RunConfig.model_fields.items() if field.is_required()}
    try:
        values = yaml.safe_load(read_regular(path, records.CONFIG_BYTES)) if path.is_file() else None
    except (ValueError, yaml.YAMLError, RecursionError):
        return False
    return isinstance(values, dict) and sections <= values.keys()


def refuse_unnamed(directory: Path) -> None:
    """Raise ConfigurationError if the directory holds more than the leftovers of a run killed during start-up."""
    try:
        found = [path.name for path, own in entries(directory, _HIDDEN) if not own]
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise ConfigurationError(
            f"{directory} cannot be a run directory: a part of its path is a file; choose another output_dir="
        ) from error
    if found:
        raise ConfigurationError(
            f"{directory} is not a run directory: it holds {_listed(found)} and no {records.CONFIG_FILE}; "
            "give another name= or output_dir="
        )


def refuse_to_replace(directory: Path) -> None:
    """Raise ConfigurationError if the directory is not a run's, or holds anything a run does not write."""
    remedy = "move it away, remove the directory yourself, or give another name="
    if not is_run(directory):
        raise ConfigurationError(
            f"overwrite=true: {directory / records.CONFIG_FILE} is not the configuration of a run, and only runs are "
            f"replaced; {remedy}"
        )
    if found := [path.relative_to(directory).as_posix() for path, own in entries(directory, OWN_NAMES) if not own]:
        raise ConfigurationError(
            f"overwrite=true: {directory} holds {_listed(found)}, which no run writes and which would be deleted; {remedy}"
        )


def refuse_links(directory: Path) -> None:
    """Raise ConfigurationError if the directory is a link, or has a link, pipe or device where a run writes files.

    Raises OSError if it cannot be read.
    """
    if directory.is_symlink():
        place = os.path.realpath(directory)
        raise ConfigurationError(
            f"{directory} is a link to {place}, outside output_dir=; remove the link, or give output_dir="
            f"{os.path.dirname(place)}"
        )
    for path, own in entries(directory, OWN_NAMES) if directory.is_dir() else ():
        if own and (path.is_symlink() or not (path.is_file() or path.is_dir())):
            what = f"a link to {os.readlink(path)}" if path.is_symlink() else "neither a file nor a directory"
            raise ConfigurationError(
                f"{path} is {what}, and a run writes only its own files; remove it or give another name="
            )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class RunDirectory:
    """A run directory and this process's lock on it, taken before any change and released by `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._owner = f"process {os.getpid()} on {platform.node()}\n{secrets.token_hex(16)}\n".encode()

    def take(self) -> None:
        """Lock the directory, which must exist, for this process. Does nothing if it is locked already.

        Raises:
            RunHeldError: another process holds it; the message names host and process.
            OSError: the lock file cannot be opened, or is a link.
        """
        if self._lock is not None:
            return
        lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise self._held() from error
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s: the file system has no locks (%s): a second process of this run would end the first",
                self.path,
                error.strerror,
            )
        os.ftruncate(lock, 0)
        os.pwrite(lock, self._owner, 0)
        self._lock = lock

    def confirm(self) -> None:
        """Check that this process still holds the directory, i.e. that the lock file is the one it wrote.

        Another process can take the directory from a living one if the file system has no locks or the lock file was
        deleted. A missing lock file is recreated.

        Raises:
            OSError: another process holds the directory, or the lock file cannot be read.
        """
        try:
            if self._read_lock() == self._owner:
                return
        except FileNotFoundError:
            self.close()
            try:
                return self.take()
            except RunHeldError as error:
                raise OSError(errno.EBUSY, str(error)) from error
        raise OSError(errno.EBUSY, str(self._held()))

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _held(self) -> RunHeldError:
        holder = self._read_lock().decode(errors="replace").partition("\n")[0] or "another process"
        return RunHeldError(f"{self.path} is being run by {holder}; wait for it, stop it, or give another name=")

    def _read_lock(self) -> bytes:
        lock = os.open(self.path / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return os.pread(lock, 1024, 0)
        finally:
            os.close(lock)

    # Replacing a run. The configuration is moved first and moved back last, so that after a crash it still tells which run
    # the files next to it belong to.

    def set_aside(self) -> None:
        """Move the run that is to be replaced into .replaced. Raises as `refuse_to_replace`."""
        refuse_to_replace(self.path)
        aside = self.path / REPLACED
        aside.mkdir()
        for path in _configuration_first(self._content()):
            path.rename(aside / path.name)
        sync_directory(self.path)

    def delete_replaced(self) -> None:
        """Delete the run that was set aside, once the new one has started."""
        if (self.path / REPLACED).is_dir():
            (self.path / REPLACED).rename(self.path / f"{DISCARDED}{secrets.token_hex(4)}")
        for discarded in self.path.glob(f"{DISCARDED}*"):
            shutil.rmtree(discarded, ignore_errors=True)

    def restore(self) -> bool:
        """Undo a replacement that ended before the new run started. Returns whether there was one."""
        aside = self.path / REPLACED
        if not aside.is_dir():
            return False
        if (aside / records.CONFIG_FILE).exists() and (self.path / records.CONFIG_FILE).exists():
            for path in reversed(_configuration_first(self._content())):  # of the new run, before its first step
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in reversed(_configuration_first(aside.iterdir())):
            path.rename(self.path / path.name)
        aside.rmdir()
        return True

    def _content(self) -> Iterable[Path]:
        return (p for p in self.path.iterdir() if p.name not in (LOCK_FILE, REPLACED) and DISCARDED not in p.name)


def _configuration_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.name != records.CONFIG_FILE)
