"""`fastfsl doctor`: what is installed, what really works, and what to do about the rest."""

import importlib
import platform
import shutil
import subprocess
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.text import Text

from fastfsl.cli.machine import threads
from fastfsl.cli.output import print_fields, print_json, stdout, stdout_kept_clean
from fastfsl.cli.parts import optional_parts, outdated, version_of

PACKAGES = (
    "fastfsl",
    "numpy",
    "safetensors",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "cuda-bindings",
    "tokenizers",
    "ftfy",
    "prometheus-client",
    "pyarrow",
    "torch",
    "torchvision",
    "triton",
    "open_clip_torch",
    "onnx",
    "onnxscript",
)
_NVIDIA_SMI_SECONDS = 10


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Report versions, package conflicts, the providers that really compute, the GPUs, and what to do.

    A provider counts once a session on it came up and gave the right answer. Optional parts that are missing are no
    problem; the command that installs each is shown.
    """
    packages = installed(PACKAGES)
    gpus, gpu_source = find_gpus()
    with stdout_kept_clean():
        usable, failures = _probe(packages)
    from fastfsl.runtime.processor import processor

    kernels = compiled_kernels()
    problems = find_problems(packages, gpus, usable, failures, kernels["reason"])
    for old in outdated():
        problems.append(
            {
                "problem": f"{old['package']} {old['installed']} is installed, fastfsl needs {old['wanted']} or newer",
                "remedy": f"pip install '{old['package']}>={old['wanted']}'",
            }
        )
    document: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "gpus": gpus,
        "gpu_source": gpu_source,
        "providers": usable,
        "sessions": dict.fromkeys(usable, "came up and computed") | failures,
        "compiled_kernels": kernels,
        "optional": optional_parts(),
        "processor": processor(),
        "threads": threads(),
    }
    if as_json:
        print_json({**document, "problems": problems})
        return
    parts = {
        extra: f"without {', '.join(part['missing'])}: {part['install']}" if part["missing"] else "installed"
        for extra, part in document["optional"].items()
    }
    print_fields("fastfsl doctor", {**document, "optional": parts})
    if not problems:
        stdout().print(Text("No problems found.", style="green"))
    for problem in problems:
        stdout().print(Text.assemble(("problem: ", "bold red"), problem["problem"]), soft_wrap=True)
        stdout().print(Text.assemble(("     do: ", "bold"), problem["remedy"]), soft_wrap=True)


def installed(names: tuple[str, ...]) -> dict[str, str | None]:
    """Version of each distribution, None where it is not installed. Nothing is imported."""
    return {name: version_of(name) for name in names}


def find_problems(
    packages: dict[str, str | None],
    gpus: list[dict[str, Any]],
    usable: list[str],
    failures: dict[str, str],
    no_kernels: str | None = None,
) -> list[dict[str, str]]:
    """What stands in the way, each with its remedy.

    Args:
        packages: distribution -> version or None.
        gpus: the GPUs found.
        usable: providers that computed.
        failures: provider -> why it did not compute.
        no_kernels: why a bundle's compiled kernels cannot be launched here; None: they can.
    """
    problems = []

    def add(problem: str, remedy: str) -> None:
        problems.append({"problem": problem, "remedy": remedy})

    cpu_build, gpu_build = packages.get("onnxruntime"), packages.get("onnxruntime-gpu")
    if cpu_build and gpu_build:
        add(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'fastfsl[gpu]' or 'fastfsl[cpu]'",
        )
    elif not cpu_build and not gpu_build:
        if packages.get("torch") and packages.get("open_clip_torch"):
            return problems  # an environment for training alone; what it lacks is among the optional parts
        add("onnxruntime is not installed: no bundle can run", "pip install 'fastfsl[cpu]' (or 'fastfsl[gpu]')")
    else:
        if "CPUExecutionProvider" not in usable:
            reason = failures.get("CPUExecutionProvider", "it did not compute")
            add(f"onnxruntime does not work: {reason}", "reinstall it: pip install --force-reinstall onnxruntime")
        if gpu_build and "CUDAExecutionProvider" not in usable:
            reason = failures.get("CUDAExecutionProvider", "it did not compute")
            remedy = (
                "pip install 'fastfsl[gpu]', which brings the CUDA libraries"
                if gpus
                else "no GPU answers: check the driver with nvidia-smi, or use onnxruntime without -gpu"
            )
            add(f"onnxruntime-gpu is installed but CUDA does not come up: {reason}", remedy)
        if gpus and not gpu_build:
            add(
                f"a GPU is present ({gpus[0]['name']}) but the installed onnxruntime is for the CPU only",
                "to use it: pip uninstall -y onnxruntime, then pip install 'fastfsl[gpu]'",
            )
        if gpus and no_kernels:
            add(
                f"a GPU is present ({gpus[0]['name']}) but the kernels compiled into bundles cannot be launched: "
                f"{no_kernels}",
                "bundles work by ONNX Runtime alone; for the kernels: pip install 'fastfsl[gpu]', or update the driver",
            )
    if not packages.get("pillow"):
        add("Pillow is not installed: images cannot be read", "pip install 'fastfsl[cpu]' (or 'fastfsl[gpu]')")
    return problems


def find_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The NVIDIA GPUs and who reported them: cuda-bindings where it is installed, else nvidia-smi, else nobody."""
    if find_spec("cuda") is not None and find_spec("cuda.bindings") is not None:
        gpus = _gpus_of_the_driver()
        if gpus is not None:
            return gpus, "cuda-bindings"
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None
    query = [program, "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(  # noqa: S603 - the program's own full path, constant arguments
            query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return [], None
    return parse_nvidia_smi(done.stdout), "nvidia-smi"


def compiled_kernels() -> dict[str, Any]:
    """Whether the kernels that a bundle may have compiled into it can be launched here, on what, and why not."""
    from fastfsl.errors import DeviceError
    from fastfsl.runtime.cuda_driver import Device, load_driver
    from fastfsl.runtime.cuda_kernels import check_architecture

    architecture = None
    try:
        card = Device(load_driver())
        architecture = f"sm_{card.architecture}"
        check_architecture(card)
    except DeviceError as error:
        return {"usable": False, "architecture": architecture, "reason": str(error)}
    return {"usable": True, "architecture": architecture, "reason": None}


def parse_nvidia_smi(text: str) -> list[dict[str, Any]]:
    """The rows of nvidia-smi's CSV; lines of another form (messages) are passed over."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            name, capability, driver, memory = fields
            gpus.append(
                {
                    "name": name,
                    "compute_capability": capability,
                    "driver": driver,
                    "memory_mib": int(memory) if memory.isdigit() else None,
                }
            )
    return gpus


def _gpus_of_the_driver() -> list[dict[str, Any]] | None:
    """The GPUs by the CUDA driver itself; None where there is no driver."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        if driver.cuInit(0)[0] != driver.CUresult.CUDA_SUCCESS:
            return None
        version = driver.cuDriverGetVersion()[1]
        gpus = []
        for index in range(driver.cuDeviceGetCount()[1]):
            device = driver.cuDeviceGet(index)[1]
            attribute = driver.CUdevice_attribute
            major, minor = (
                driver.cuDeviceGetAttribute(key, device)[1]
                for key in (
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                )
            )
            gpus.append(
                {
                    "name": driver.cuDeviceGetName(64, device)[1].split(b"\0")[0].decode(),
                    "compute_capability": f"{major}.{minor}",
                    "driver": f"CUDA {version // 1000}.{version % 1000 // 10}",
                    "memory_mib": driver.cuDeviceTotalMem(device)[1] // 2**20,
                }
            )
    except Exception:  # noqa: BLE001 - without a driver the bindings fail in several ways; nvidia-smi is asked next
        return None
    return gpus


def _probe(packages: dict[str, str | None]) -> tuple[list[str], dict[str, str]]:
    """Providers that computed, and why the others did not."""
    if not packages["onnxruntime"] and not packages["onnxruntime-gpu"]:
        return [], {}
    from fastfsl.runtime.probe import probe

    probes = [probe("cpu"), probe("cuda")]
    usable = [found.provider for found in probes if found.error is None]
    return usable, {found.provider: found.error for found in probes if found.error is not None}
