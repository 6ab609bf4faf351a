"""`make demo`: a vendor's model has drifted at a client that may not send pictures. Fine-tune it, prove that it got no worse, deploy it.

Server, vendor and client are processes of their own on this machine, with certificates and mutual TLS. What is printed after a $ is what
their people would type; read `main` for the order. All of it is in a new folder below runs/.
"""

import contextlib
import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import torch
import typer
from devices import CLIENT, SIDE, VENDOR, digits, write_pictures
from model import build
from torch import nn

from hanse import Run
from hanse.cli.main import app
from hanse.errors import HanseError
from hanse.finetuning.contract import WRITTEN, Gate, Schema, read_project, write_project
from hanse.finetuning.data import Images, load, prepared
from hanse.finetuning.models import params_of, score
from hanse.finetuning.versions import Versions
from hanse.messages.codec import write
from hanse.messages.flmodel import FLModel
from hanse.process import die_with_parent
from hanse.statistics.error_rates import eer

SEED = 0
MEAN, STD = 0.3, 0.4  # of brightness, from 0 to 1
SCHEMA = Schema(shape=[SIDE, SIDE, 1], mean=[MEAN], std=[STD], slices=["device"], group="digit")
VERA, CLARA = ("--kit", "federation/admins/vera"), ("--kit", "federation/admins/clara")  # of the vendor, and of the client

FEDERATION = """\
federation: rings
server: {{organisation: Acme Vision, addresses: [127.0.0.1], port: {port}, listen: "127.0.0.1:{port}"}}
admins:
  - {{name: vera, organisation: Acme Vision, role: researcher}}
  - {{name: clara, organisation: North Works, role: researcher}}
sites:
  - {{name: acme, organisation: Acme Vision}}
  - {{name: north, organisation: North Works}}
"""

# scikit-learn has 1,797 digits, and the holdout gets 550 of them, each through the vendor's three devices: 1,650 rows. Rows of one digit
# say less than rows of three, so the schema groups them, and the gate counts digits. With so few of them nobody can prove the default
# margin, 0.5 percentage points: that takes thousands. So these two parties agree on 2 points.
GATE = Gate(margin_abs=0.02)


def main():
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    pictures, labels, names = digits(rng)

    def some(first, last):
        return pictures[first:last], labels[first:last], names[first:last]

    say("The vendor has 700 digits from its own devices, and a model that it has trained on them")
    write_pictures(Path("acme/data/train"), some(0, 700), VENDOR, rng)
    write_pictures(Path("acme/data/holdout"), some(700, 1250), VENDOR, rng, every=True)
    threshold = train_base(Path("acme/data"), Path("base.safetensors"))
    hanse(
        "finetune init acme --name rings --vendor 'acme=Acme Vision' --clients 'north=North Works' --kind image",
        f"--shape {SIDE}x{SIDE}x1 --classes plain,ring --mean {MEAN} --std {STD} --slices device --group digit",
        f"--mode rehearsed --vendor-weight 0.5 --model {Path(__file__).with_name('model.py')}",
    )
    write_project(Path("acme"), msgspec.structs.replace(read_project(Path("acme")), gate=GATE))
    print(f"in acme/project.yaml both agree that the gate's margin is {GATE.margin_abs:.1%}, as few digits exist")
    hanse(f"finetune versions add --weights base.safetensors --threshold {threshold:.4f} --project acme")

    say("Everybody gets an identity, and the client a project folder; its 50 labelled pictures are from devices that the vendor never saw")
    Path("federation.yaml").write_text(FEDERATION.format(port=free_port()))
    hanse("provision federation.yaml --folder federation")
    hanse("finetune invite north --project acme --to north", *VERA)
    write_pictures(Path("north/data/train"), some(1250, 1300), CLIENT, rng)
    write_pictures(Path("north/data/test"), some(1300, None), CLIENT, rng, every=True)
    for site in ("acme", "north"):
        hanse(f"finetune check --project {site}")
    print("\nThe warnings are right, and expected: what is measured on shows each digit once for each device.")

    say("Server, vendor and client are three processes, which trust nobody without a certificate")
    with contextlib.ExitStack() as processes:
        add_lines("federation/server/kit.yaml", "sandbox: preferred")
        ready(processes.enter_context(running("server start federation/server")))
        agents = []
        for site in ("acme", "north"):
            kit = Path("federation/sites", site)
            hanse(f"site join {kit} --token {kit}/join.token")
            folder = Path(site).resolve()
            written = ", ".join(str(folder / name) for name in WRITTEN)  # by training code; all else there it may only read
            add_lines(kit / "kit.yaml", f"data: [{folder}]", f"keep: [{written}]", f"config: {{finetuning: {folder}}}")
            (kit / "policy.yaml").write_text("sandbox: preferred\n")
            agents.append(processes.enter_context(running(f"site start {kit}")))
        for agent in agents:
            ready(agent)

        say("Both controls, then four round trips, in which the change of the weights travels; then the vendor's gate decides")
        hanse("finetune run --project acme", *VERA)
        candidate = Versions(Path("acme")).list()[-1].digest.removeprefix("blake3:")[:12]

        say("Two people sign: Vera approves, Clara looks at it and accepts")
        hanse(f"finetune approve {candidate} --project acme", *VERA)
        hanse(f"finetune deliver {candidate} --project acme", *VERA)
        hanse("finetune receive --project north", *CLARA)
        hanse(f"finetune accept {candidate} --project north --why 'fewer errors on both belts'", *CLARA)
        hanse(f"finetune deliver {candidate} --project acme", *VERA)
        for site, person in (("acme", VERA), ("north", CLARA)):
            hanse(f"finetune deploy {candidate} --project {site}", *person)
        hanse("finetune status --project north")
    summary()


def train_base(data, path):
    """Train the vendor's model on its own pictures and write it to the path. Returns its operating threshold, found on the holdout."""
    train, holdout = (load(Images(folder=name), SCHEMA, data) for name in ("train", "holdout"))
    x, y = torch.from_numpy(prepared(train, SCHEMA)), torch.from_numpy(train.labels).float()
    torch.manual_seed(SEED)
    net, epochs, batch = build(), 12, 32
    optimizer = torch.optim.Adam(net.parameters(), lr=0.002)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(y) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(batch):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(net(x[rows])[:, 0], y[rows]).backward()
            optimizer.step()
            schedule.step()
    write(path, FLModel(params_of(net)))
    return eer(score(net, prepared(holdout, SCHEMA)), holdout.labels)[1]


def summary():
    """What came of it, and what to look at."""
    [report] = Path("acme/runs").glob("*/finetuning.html")
    run = Run(report.parent)
    figures = {(each["what"], each["party"]): each for each in run.events("figures")}
    say("What each model does at both parties, on rows that nobody trained on")
    print(f"{'':30} {'EER north':>10} {'HTER north':>11} {'EER acme':>9} {'HTER acme':>10}")
    names = {"base": "deployed before", "vendor alone": "control: vendor alone", "client alone": "control: client alone"}
    for what, name in (names | {"candidate": "candidate: trained together"}).items():
        north, acme = figures[what, "north"], figures[what, "acme"]
        print(f"{name:30} {north['eer']:10.1%} {north['hter']:11.1%} {acme['eer']:9.1%} {acme['hter']:10.1%}")
    left = sum(each["up_bytes"] for each in run.events("crossed") if (each["party"], each["task"]) == ("north", "train"))
    [gate] = run.events("gate")
    print(f"\n{json.loads(gate['evidence'])['words']}")
    print(f"\n{left / 1000:,.0f} kB of changes to weights left the client, controls included, and no picture.")
    print(f"report   {report.resolve()}\n\nTry, in {Path().resolve()}:")
    print("  hanse finetune versions rollback --project north --why 'just to see'\n  hanse finetune history --project north --verify")


def say(text):
    print(f"\n# {text}.", flush=True)


def hanse(*words):
    """Do what the command does. Not in a process of its own, as that takes a second to start, and there are twenty."""
    line = " ".join(words)
    print(f"\n$ hanse {line}", flush=True)
    with contextlib.redirect_stderr(sys.stdout):
        if status := app(shlex.split(line), standalone_mode=False):
            sys.exit(status)


@contextlib.contextmanager
def running(line):
    """A process of its own, with its log in logs/. It ends when this is left, and when this process dies."""
    print(f"\n$ hanse {line} &", flush=True)
    log = Path("logs", f"{Path(line).name}.log")
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "hanse.cli.main", *shlex.split(line)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, preexec_fn=die_with_parent
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()


def ready(process):
    """Wait for the line that it prints once it is connected."""
    if line := process.stdout.readline():
        print(line, end="", flush=True)
    else:
        sys.exit(f"a process has ended: {Path('logs').resolve()} says why")


def add_lines(path, *lines):
    with Path(path).open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def new_folder():
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = Path("runs", f"finetuning-{number:03}")
            folder.mkdir(parents=True)
            return folder


if __name__ == "__main__":
    os.chdir(new_folder())
    try:
        main()
    except HanseError as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
