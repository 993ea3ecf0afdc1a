"""What `fedtune status` shows of devices, from a folder as a service leaves it."""

import json

from typer.testing import CliRunner

from fedtune.cli.main import app

DEVICE = {
    "name": "kitchen",
    "state": "ready",
    "online": True,
    "reason": "",
    "examples": 1200,
    "held_out": 300,
    "class": "",
}


def shown(folder, *devices):
    (folder / "service.json").write_text(
        json.dumps(
            {
                "pid": 1,
                "address": "127.0.0.1:9092",
                "insecure": True,
                "state": "training",
                "devices": devices,
                "job": None,
                "queue": [],
            }
        )
    )
    found = CliRunner().invoke(app, ["status", "--dir", str(folder)], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    return found.output


def test_classes_are_shown_where_a_device_names_one(tmp_path):
    assert "class" not in shown(tmp_path, DEVICE)
    text = shown(tmp_path, DEVICE, DEVICE | {"name": "hall", "class": "phone"})
    assert "class" in text and "phone" in text and "1,200" in text


def test_words_of_devices_are_shown_as_they_are(tmp_path):
    """Square brackets are markup to rich, which fails on an end without a beginning."""
    text = shown(tmp_path, DEVICE | {"state": "refused", "reason": "data: [/bold] [red]", "class": "[/]"})
    assert "data: [/bold] [red]" in text and "[/]" in text
