"""The probe of an S3 server: puts its place and its questions together. Knows no question itself."""

from __future__ import annotations

from castore.config_backends import S3Settings
from castore.storage.backends.s3_connection import S3Connection
from castore.storage.backends.s3_probe_parts import part_questions
from castore.storage.backends.s3_probe_place import ProbePlace
from castore.storage.backends.s3_probe_put import put_questions
from castore.storage.backends.s3_probe_read import read_questions
from castore.storage.probing import ask_all
from castore.storage.spi import ProbeReport


async def probe_s3(connection: S3Connection, settings: S3Settings) -> ProbeReport:
    """Ask everything, and leave nothing. Raises StorageError when the server does not even list the bucket."""
    place = ProbePlace(connection, settings)
    await place.sweep()
    try:
        findings = await ask_all((*put_questions(place), *read_questions(place), *part_questions(place)))
    finally:
        await place.clean()
    return ProbeReport(place.server, findings)
