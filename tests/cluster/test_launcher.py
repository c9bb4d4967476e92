"""`ray up` and `ray down` of cluster.yaml against a server that answers as EC2 does.

ssh and rsync are stubs that note what they were asked; everything else is Ray's launcher itself.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def cloud() -> Iterator[dict[str, str]]:
    """Return the environment of a client of a mock of AWS that runs while the tests do."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    server = subprocess.Popen(
        [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not _listens(port):
        assert server.poll() is None and time.monotonic() < deadline, "moto does not start"
        time.sleep(0.2)
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-west-2",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.kill()
    server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def client(cloud: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function from a service's name to boto3's client of the mock."""
    import boto3

    for name, value in cloud.items():
        monkeypatch.setenv(name, value)
    return lambda service: boto3.client(service, region_name="us-west-2")


def make_roles(client: Any) -> None:
    """Do what `aws cloudformation deploy` of cluster.yaml's head does."""
    made = client("cloudformation").create_stack(
        StackName="selfsup-ray",
        TemplateBody=(ROOT / "cluster-roles.yaml").read_text(),
        Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "my-bucket"}],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    [stack] = client("cloudformation").describe_stacks(StackName=made["StackId"])["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"


ANSWERS = {
    "command -v docker": "/usr/bin/docker",
    ".State.Running": "false",
    "json .Config.Env": '["HOME=/home/ray"]',
    "printenv HOME": "/home/ray",
}
"""What a machine that can run containers says to the launcher's questions."""


def stub(folder: Path, name: str) -> None:
    """Put a program on the path that notes its arguments, answers as a machine, and succeeds."""
    cases = "".join(f"  *'{asked}'*) echo '{answer}';;\n" for asked, answer in ANSWERS.items())
    program = folder / name
    note = f'echo "{name} $*" >> "{folder}/calls"'
    program.write_text(f'#!/bin/sh\n{note}\ncase "$*" in\n{cases}esac\n')
    program.chmod(0o755)


def ray(folder: Path, cloud: dict[str, str], *arguments: str) -> str:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, **cloud, "HOME": str(home)}
    environment |= {"PATH": f"{folder}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(BIN / "ray"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def instances(ec2: Any) -> list[Any]:
    pages = ec2.describe_instances()["Reservations"]
    return [instance for page in pages for instance in page["Instances"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_up_starts_the_head_installs_the_package_and_ray_down_leaves_nothing(
    tmp_path: Path, cloud: dict[str, str], client: Any
):
    make_roles(client)
    made = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    image = client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for kind in made["available_node_types"].values():
        kind["node_config"]["ImageId"] = image  # the mock lacks the one that Ray takes by default
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(made))
    for name in ("ssh", "rsync"):
        stub(tmp_path, name)

    ray(tmp_path, cloud, "up", "-y", "--no-config-cache", str(path))
    [head] = instances(client("ec2"))
    assert head["State"]["Name"] == "running"
    assert (
        head["InstanceType"] == made["available_node_types"]["head"]["node_config"]["InstanceType"]
    )
    assert head["IamInstanceProfile"]["Arn"].endswith("/selfsup-ray-head")
    assert "InstanceLifecycle" not in head, "the head is no spot instance"
    calls = (tmp_path / "calls").read_text()
    assert re.search(r"rsync .*selfsup_ray", calls)
    home = r"/home" r"/\w+"
    assert re.search(f"pip install --quiet -e {home}/selfsup_ray", calls), "in the container's home"
    assert "ray start --head" in calls and "--dashboard-host=127.0.0.1" in calls

    ray(tmp_path, cloud, "down", "-y", str(path))
    assert [one["State"]["Name"] for one in instances(client("ec2"))] == ["terminated"]
