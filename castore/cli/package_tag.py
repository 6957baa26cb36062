"""`castore package tag`: sets, moves, rolls back, removes and lists tags."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import Any

import click

from castore.cli.completing import NAME, TAG, VERSION
from castore.cli.output import format_time_ns, print_columns, print_json
from castore.cli.session import Session, common_options, json_option
from castore.registry.names import parse_ref


@click.command("tag")
@click.argument("name", type=NAME)
@click.argument("tag", type=TAG, required=False)
@click.argument("version", type=VERSION, required=False)
@click.option("--remove", is_flag=True, help="Remove the tag; of `latest`, its pin.")
@click.option("--rollback", is_flag=True, help="Have the tag point to what it did before its last change.")
@click.option("--history", is_flag=True, help="List every change of the tags of NAME.")
@json_option
@common_options
@click.pass_obj
def tag(
    session: Session,
    name: str,
    tag: str | None,
    version: str | None,
    remove: bool,
    rollback: bool,
    history: bool,
    as_json: bool,
) -> None:
    """Make packages/NAME/TAG a link to VERSION, at once and for all mounts. Without TAG, list the tags of NAME.

    With the tag `latest`, that is pinned: no publish moves it until --remove. A version with a tag cannot be deleted.

    Example: castore package tag zlib stable 1.2, then castore package tag zlib stable --rollback
    """
    from castore.catalog.writer import CatalogWriter
    from castore.registry.tags import remove_tag, roll_back, tag_package

    given = sum((version is not None, remove, rollback))
    if tag is None and not (remove or rollback):
        parse_ref(f"{name}/latest", allow_latest=True)
        _list(session, name, history, as_json)
        return
    if tag is None or given != 1 or history:
        raise click.UsageError("give NAME, or NAME TAG and one of VERSION, --remove and --rollback")
    parse_ref(f"{name}/{tag}", allow_latest=True)
    change: Any
    if version is not None:
        parse_ref(f"{name}/{version}")
        change = partial(tag_package, name=name, tag=tag, version=version, uid=os.getuid())
    else:
        change = partial(remove_tag if remove else roll_back, name=name, tag=tag, uid=os.getuid())
    with contextlib.closing(CatalogWriter(session.config().store.catalog_path)) as writer:
        result = writer.run_sync(change)
    now = version or (result if rollback else "")
    if as_json:
        print_json({"name": name, "tag": tag, "version": now or None})
    else:
        click.echo(f"{name}/{tag} -> {now}" if now else f"{name} has no tag {tag} any more")


def _list(session: Session, name: str, history: bool, as_json: bool) -> None:
    from castore.catalog.tagging import TagReader

    with TagReader(session.config().store.catalog_path) as reader:
        tags, changes = reader.tags(name), reader.changes(name) if history else []
    if as_json:
        document: dict[str, Any] = {
            "name": name,
            "tags": [{"tag": one.tag, "version": one.version, "set_at_ns": one.set_at_ns} for one in tags],
        }
        if history:
            document["changes"] = [
                {
                    "tag": one.tag,
                    "version": one.version or None,
                    "changed_at_ns": one.changed_at_ns,
                    "changed_by_uid": one.changed_by_uid,
                }
                for one in changes
            ]
        print_json(document)
    elif history:
        rows = [
            (one.tag, one.version or "-", format_time_ns(one.changed_at_ns), str(one.changed_by_uid)) for one in changes
        ]
        print_columns([("TAG", "VERSION", "SINCE", "BY UID"), *rows])
    elif tags:
        now = [(one.tag, one.version, format_time_ns(one.set_at_ns)) for one in tags]
        print_columns([("TAG", "VERSION", "SINCE"), *now])
    else:
        click.echo(f"{name} has no tags")
