"""The command ``rlrc``: finds the command's dataclass, fills it from the arguments with tyro, and runs it.

Only the chosen command's module is imported, so that robots never import torch. Exit codes: 0 success; 1 a check or
claim failed; 2 wrong usage or bad input, with one line on stderr; 128 + the signal's number if interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import importlib
import importlib.metadata
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

from rlrc import interrupts
from rlrc.errors import UserError
from rlrc.folders import storage_message
from rlrc.printable import printable

# Command: where its dataclass is, and what it does; in the order of the work.
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": (
        "rlrc.runtime.cli.policy:InspectPolicy",
        "describe a policy: family, geometry, bytes, cameras, actions, history",
    ),
    "new": ("rlrc.compressor.cli.new:New", "create an untrained policy of the reference family"),
    "sft": ("rlrc.compressor.cli.training:SFT", "train on demonstrations"),
    "distill": (
        "rlrc.compressor.cli.training:Distill",
        "train on demonstrations and on a dense teacher's hidden states",
    ),
    "sensitivity": (
        "rlrc.compressor.cli.sensitivity:Sensitivity",
        "measure how much the actions depend on each module",
    ),
    "prune": ("rlrc.compressor.cli.stages:Prune", "cut attention heads and MLP channels"),
    "rl": ("rlrc.compressor.cli.training:RL", "recover by reinforcement learning (PPO)"),
    "quantize": ("rlrc.compressor.cli.stages:Quantize", "quantize the weights to 4 or 8 bits"),
    "compare-grids": (
        "rlrc.compressor.cli.compare_grids:CompareGrids",
        "compare the errors of quantization methods and bits",
    ),
    "compress": (
        "rlrc.compressor.cli.compress:Compress",
        "run all stages of a recipe: prune, sft, distill, rl, quantize",
    ),
    "write-back": (
        "rlrc.compressor.cli.checkpoints:WriteBack",
        "write the weights in the checkpoint's original format",
    ),
    "export": ("rlrc.exporters.cli:Export", "create and verify the graphs that the runtime loads"),
    "verify": ("rlrc.runtime.cli.policy:Verify", "replay the golden observations through the graphs on this machine"),
    "infer": ("rlrc.runtime.cli.policy:Infer", "compute one chunk of actions from one observation"),
    "run": ("rlrc.runtime.cli.run:RunPolicy", "run the control loop on a robot, a simulator or a recording"),
    "serve": ("rlrc.runtime.cli.serve:Serve", "serve a policy over the network, in the protocols of robot clients"),
    "bench latency": (
        "rlrc.benchmarks.cli.measure:MeasureLatency",
        "milliseconds per action chunk, against a baseline",
    ),
    "bench memory": ("rlrc.benchmarks.cli.measure:MeasureMemory", "bytes on disk and in memory"),
    "bench energy": ("rlrc.benchmarks.cli.resources:Energy", "joules per action, on machines that can measure it"),
    "bench throughput": (
        "rlrc.benchmarks.cli.resources:Throughput",
        "actions per second of one or more policies at once",
    ),
    "bench success": (
        "rlrc.benchmarks.cli.measure:MeasureSuccess",
        "success rate in the simulator, with confidence intervals",
    ),
    "bench loop": ("rlrc.benchmarks.cli.loop:Loop", "the control loop: steady rate, slow inference, faults"),
    "bench serving": (
        "rlrc.benchmarks.cli.serving:Serving",
        "the cost of serving beyond inference, with shared memory",
    ),
    "bench claims": ("rlrc.benchmarks.cli.claims:Claims", "check the project's claims against the results"),
    "bench compare": ("rlrc.benchmarks.cli.compare:Compare", "check whether new results are worse than old ones"),
    "data inspect": (
        "rlrc.compressor.cli.data:InspectDataset",
        "describe a LeRobotDataset and check that it fits a policy",
    ),
    "data demonstrations": (
        "rlrc.compressor.cli.data:Demonstrations",
        "record scripted experts in the simulator as a LeRobotDataset",
    ),
    "jetson build": (
        "rlrc.jetson.cli.engines:BuildEngines",
        "build TensorRT engines from an artifact's graphs, on the device",
    ),
    "jetson check": (
        "rlrc.jetson.cli.engines:CheckGraphs",
        "check that NVIDIA's builder accepts the graphs, without a GPU",
    ),
    "jetson install": ("rlrc.jetson.cli.install:Install", "set up a board: JetPack, engines with CUDA, services"),
    "jetson doctor": (
        "rlrc.jetson.cli.doctor:Doctor",
        "check this board's set-up, and an artifact on it",
    ),
    "jetson deploy": (
        "rlrc.jetson.cli.deploy:Deploy",
        "copy an artifact to the robot's computer by ssh and try it there",
    ),
    "jetson rollback": ("rlrc.jetson.cli.deploy:Rollback", "go back to the last artifact that was verified there"),
    "jetson devices": (
        "rlrc.jetson.cli.plan:ListDevices",
        "list the modules, their power modes, memory and throughput",
    ),
    "jetson plan": (
        "rlrc.jetson.cli.plan:PredictPlan",
        "predict a policy's memory and latency on a module",
    ),
    "jetson calibration": (
        "rlrc.jetson.cli.plan:ShowCalibration",
        "show the measurements behind the plans, and their errors",
    ),
    "report": ("rlrc.benchmarks.cli.report:WriteReport", "write results as one self-contained HTML page"),
}

# The extra that installs each optional module.
EXTRAS = {
    "onnxruntime": "cpu",
    "aiohttp": "serve",
    "grpc": "serve",
    "accelerate": "compress",
    "huggingface_hub": "compress",
    "peft": "compress",
    "safetensors": "compress",
    "torch": "compress",
    "torch_pruning": "compress",
    "transformers": "compress",
    "gguf": "export",
    "onnx": "export",
    "fast_simplification": "sim",
    "gymnasium": "sim",
    "metaworld": "sim",
    "mujoco": "sim",
    "trimesh": "sim",
    "av": "data",
    "pyarrow": "data",
    "matplotlib": "report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. ``arguments`` are those of the process unless given."""
    code = 0

    def end_promptly() -> None:
        """Ends an interrupted process at once: tearing down torch and similar modules takes a second or more."""
        if code in interrupts.CODES:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    if arguments is None:
        atexit.register(end_promptly)  # registered first, so it runs last, after threads and other handlers have ended
    with interrupts.raise_on_signal():
        code = _main(list(sys.argv[1:] if arguments is None else arguments))
    return code


def _main(arguments: list[str]) -> int:
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(overview())
            return 0
        if arguments[0] == "--version":
            print(f"rlrc {importlib.metadata.version('rlrc')}")
            return 0
        if arguments[0] in groups() and arguments[1:] in ([], ["-h"], ["--help"]):
            print(overview(f"{arguments[0]} "))
            return 0
        name, rest = choose(arguments)
        code: int = parse(name, rest).run() or 0
        sys.stdout.flush()  # here, where a broken pipe can still be handled
        return code
    except UserError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in EXTRAS:
            raise  # a bug, not something to install
        return _refuse(f"expected the module {module}, found none; run pip install 'rlrc[{EXTRAS[module]}]'")
    except BrokenPipeError:  # as in `rlrc sft --help | head`
        return _handle_broken_pipe()
    except SystemExit as exit_:
        if isinstance(
            exit_.__context__, BrokenPipeError
        ):  # rich exits with 1 on a broken pipe, but here 1 is a failed check
            return _handle_broken_pipe()
        raise
    except Exception as error:
        names = [getattr(error, name, None) for name in ("filename2", "filename")]  # of a copy, the second is written
        if (message := storage_message(error, next(filter(None, names), "a file"))) is None:
            raise
        return _refuse(message)
    except KeyboardInterrupt as error:
        print(f"rlrc: interrupted{'; ' * bool(str(error))}{error}", file=sys.stderr)
        return getattr(error, "code", 130)


def overview(prefix: str = "") -> str:
    """The help page of all commands whose names start with ``prefix``."""
    chosen = {name: text for name, (_, text) in COMMANDS.items() if name.startswith(prefix)}
    lines = [f"  {name:<21}{text}" for name, text in chosen.items()]
    usage = f"usage: rlrc {prefix}COMMAND ...   (rlrc {prefix}COMMAND --help for details)"
    return "\n".join([usage, "", "Compress vision-language-action policies and run them on the robot.", "", *lines])


def groups() -> set[str]:
    """The first words of two-word commands."""
    return {name.split()[0] for name in COMMANDS if " " in name}


def choose(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and its arguments. Raises UserError for an unknown one."""
    for words in (1, 2):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, list(arguments[words:])
    name = " ".join(arguments[:2] if arguments[0] in groups() else arguments[:1])
    close = difflib.get_close_matches(name, COMMANDS, 1)
    advice = f"did you mean {close[0]}?" if close else "run rlrc --help"
    raise UserError(f"expected one of the commands {', '.join(COMMANDS)}, found {name!r}; {advice}")


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The command's dataclass, filled. Raises UserError for bad arguments; prints help and exits if asked to."""
    module, attribute = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), attribute)
    import tyro  # imported here, so that the overview and unknown names answer at once

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(command, prog=f"rlrc {name}", args=list(arguments))
    except SystemExit as exit_:
        if not exit_.code:
            sys.stdout.flush()
            raise  # --help
        _refuse_unknown_options(name, command, arguments)
        found = _unbox(output.getvalue())
        own = re.fullmatch(r"Value error; Error parsing \S+: (expected .*)", found)  # a configuration's UserError
        message = own[1] if own else found
        raise UserError(message if own and ";" in message else f"{message}; run rlrc {name} --help") from None


def _refuse_unknown_options(name: str, command: Any, arguments: Sequence[str]) -> None:
    """Raises UserError for an option that the command does not have.

    tyro may report something else first, such as a positional argument that the misspelt option leaves without a value.
    """
    import tyro

    page = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(page):
        tyro.cli(command, args=["--help"])
    lines = (line.strip(" │|") for line in page.getvalue().splitlines())
    known = {option for line in lines if line.startswith("-") for option in re.findall(r"--[a-z][a-z0-9-]*", line)}
    for given in arguments:
        option = given.split("=")[0].replace("_", "-")
        if option.startswith("--") and option != "--" and option not in known:
            close = difflib.get_close_matches(option, known, 1)
            nearest = f"; the nearest is {close[0]}" if close else ""
            raise UserError(f"expected an option of rlrc {name}, found {option}{nearest}; run rlrc {name} --help")


def _handle_broken_pipe() -> int:
    """The exit code of a program that SIGPIPE ends. Discards remaining output, or Python would report an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _unbox(text: str) -> str:
    """tyro's framed error message as one line, without its heading and its advice to read the help."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │|") for line in text.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines:
        if set(line) <= set("─-+"):
            sections.append([])
        elif line[0] not in "╭╰+":
            sections[-1].append(line)
    kept = [" ".join(section) for section in sections if section]
    kept = [section for section in kept if not section.startswith(("For full helptext", "Argument helptext"))]
    return "; ".join(kept).rstrip(".") or "expected other arguments"


def _refuse(message: str) -> int:
    print("rlrc: error: " + printable(" ".join(message.split())), file=sys.stderr)
    return 2
