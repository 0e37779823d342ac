"""The device catalog, the user's changes, and the detection of this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.errors import ConfigError
from trivium.files import GIB
from trivium.plan import devices
from trivium.plan.devices import catalog, get, host_memory_bytes, identify, this_machine

# Names and memory in MiB as `nvidia-smi` prints them, and the device behind them.
REPORTED = {
    ("NVIDIA A100-SXM4-80GB", 81920): "a100-80",
    ("NVIDIA A100 80GB PCIe", 81920): "a100-80",
    ("NVIDIA A100-PCIE-40GB", 40960): "a100-40",
    ("Tesla V100-SXM2-16GB", 16160): "v100-16",
    ("Tesla V100-SXM2-32GB", 32510): "v100-32",
    ("Tesla T4", 15360): "t4",
    ("NVIDIA A10G", 23028): "a10g",
    ("NVIDIA A10", 23028): "a10",
    ("NVIDIA L40S", 46068): "l40s",
    ("NVIDIA H100 80GB HBM3", 81559): "h100-80",
    ("NVIDIA H100 PCIe", 81559): "h100-pcie",
    ("NVIDIA H200", 143771): "h200",
    ("NVIDIA RTX 6000 Ada Generation", 49140): "rtx-6000-ada",
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887): "rtx-pro-6000",
    ("NVIDIA GeForce RTX 4090", 24564): "rtx-4090",
    ("NVIDIA GeForce RTX 5090", 32607): "rtx-5090",
}
# Total capacity in GiB, as out-of-memory messages of PyTorch in public issues name it.
CAPACITY = {"rtx-4090": 23.64, "rtx-3090": 23.69, "rtx-5090": 31.37, "t4": 14.76, "v100-16": 15.75, "h200": 139.81}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home folder."""
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path))
    return tmp_path


def test_catalog_has_every_kind():
    known = catalog()
    assert len(known) >= 28
    assert {device.kind for device in known.values()} == {"gpu", "apple", "cpu"}
    assert all(device.name == name and device.source and device.title for name, device in known.items())


def test_catalog_figures_are_plausible():
    for device in catalog().values():
        assert 8 * GIB < device.memory_bytes < 600 * GIB, device.name
        assert 2e10 <= device.bandwidth <= 1e13, device.name
        # A product of fp32 numbers is never the faster one; the dense rate of 16 bits is at most 35 times it.
        assert all(device.flops["fp32"] <= rate <= 35 * device.flops["fp32"] for rate in device.flops.values())


def test_catalog_prices_have_source_and_date():
    priced = [device for device in catalog().values() if device.price_per_hour is not None]
    assert len(priced) >= 12
    for device in priced:
        assert device.price_source and re.fullmatch(r"20\d\d-\d\d(-\d\d)?", device.price_date), device.name


def test_catalog_rates_are_dense():
    # Data sheets print both; these are the dense ones.
    assert get("a100-80").flops["bf16"] == 312e12
    assert get("h100-80").flops["bf16"] == 989e12
    assert get("l40s").flops["bf16"] == 362e12


@pytest.mark.parametrize("name", CAPACITY)
def test_catalog_memory_is_usable(name):
    there = get(name).memory_bytes / GIB
    assert 0.97 * CAPACITY[name] < there <= CAPACITY[name]


def test_catalog_hardware_without_bf16():
    assert "bf16" not in get("t4").flops and "bf16" not in get("v100-32").flops


def test_get_device_by_name():
    assert get("H100-80") == get("h100-80")
    with pytest.raises(ConfigError, match="the nearest is 'a100-80'"):
        get("a100-8")


@pytest.mark.parametrize(("reported", "name"), REPORTED.items())
def test_identify_driver_names(reported, name):
    device = identify(reported[0], reported[1] << 20)
    assert device.name == name
    assert device.memory_bytes <= reported[1] << 20


def test_identify_slice_of_gpu():
    assert identify("NVIDIA A100-SXM4-80GB", 9856 << 20).memory_bytes == 9856 << 20


def test_identify_unknown_gpu():
    # A laptop's card has half the memory and half the rates of the desktop's of the same number.
    laptop = identify("NVIDIA GeForce RTX 4090 Laptop GPU", 16376 << 20)
    assert laptop.name == "this-gpu" and "catalog" in laptop.source
    assert laptop.memory_bytes < 16376 << 20
    assert laptop.bandwidth < get("rtx-4090").bandwidth
    assert laptop.price_per_hour is None


def test_catalog_user_price(home):
    shipped = get("h100-80")
    (home / "devices.yaml").write_text("H100-80: {price_per_hour: 2.10}\n")
    edited = get("h100-80")
    assert edited.price_per_hour == 2.10
    assert edited.price_source == str(home / "devices.yaml") and edited.price_date == ""
    assert (edited.flops, edited.memory_bytes, edited.title) == (shipped.flops, shipped.memory_bytes, shipped.title)
    assert len(catalog()) == len(devices._read(devices.CATALOG_FILE))


def test_catalog_user_device(home):
    (home / "devices.yaml").write_text(
        "my-card:\n  title: My card\n  memory_gib: 20\n  bandwidth_gb_per_second: 500\n"
        "  tflops: {fp32: 10, bf16: 40}\n  link_gb_per_second: 16\n  source: measured\n"
    )
    mine = get("my-card")
    assert (mine.kind, mine.memory_bytes, mine.flops["bf16"]) == ("gpu", 20 * GIB, 40e12)
    assert mine.price_per_hour is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("mine: {title: Mine}", "mine.memory_gib: Field required"),
        ("h100-80: {price: 2.1}", "h100-80.price: Extra inputs"),
        ("h100-80: {price_per_hour: '2.1'}", "h100-80.price_per_hour: Input should be a valid number"),
        ("h100-80: {price_per_hour: -1}", "greater than or equal to 0"),
        ("h100-80: {price_per_hour: .inf}", "finite"),
        ("h100-80: {tflops: {bf16: 989}}", "h100-80.tflops.fp32: Field required"),
        ("h100-80: {kind: tpu}", "'gpu', 'apple' or 'cpu'"),
        ("h100-80: 2.10", "expected the name of a device and its keys"),
        ("- h100-80", "expected the name of a device and its keys"),
        ("../x: {price_per_hour: 1}", "expected the name of a device and its keys"),
        ("h100-80: !!python/object/apply:os.system ['true']", "found the tag"),
        ("h100-80: {price_per_hour: 1}\nh100-80: {price_per_hour: 2}", "set twice"),
    ],
)
def test_catalog_refuses_wrong_user_file(home, content, said):
    (home / "devices.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        catalog()
    assert said in str(caught.value) and str(home / "devices.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=80))
def test_catalog_of_random_bytes(tmp_path_factory, content):
    home = tmp_path_factory.mktemp("home")
    (home / "devices.yaml").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIVIUM_HOME", str(home))
        try:
            assert len(catalog()) >= 28
        except ConfigError as error:
            assert "\n" not in str(error)


def test_this_machine_asks_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert this_machine().name == "h100-80"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert this_machine().kind in ("cpu", "apple")


def test_host_memory_bytes_of_container(tmp_path, monkeypatch):
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for text, expected in (("max\n", physical), (f"{1 << 30}\n", 1 << 30), (f"{1 << 60}\n", physical)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(devices, "CGROUP_LIMIT", tmp_path / "memory.max")
        assert host_memory_bytes() == expected


@pytest.mark.parametrize(
    ("flags", "bf16_over_fp32"),
    [("sse avx2", None), ("avx2 avx512f", None), ("avx2 avx512f avx512_bf16", 2), ("avx512f avx512_bf16 amx_bf16", 32)],
)
def test_processor_bf16_by_flags(tmp_path, monkeypatch, flags, bf16_over_fp32):
    (tmp_path / "cpuinfo").write_text(f"model name\t: A processor\ncpu MHz\t\t: 3000.0\nflags\t\t: {flags}\n\n" * 2)
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    found = devices.processor()
    assert found.flops.get("bf16") == (None if bf16_over_fp32 is None else bf16_over_fp32 * found.flops["fp32"])
    assert "A processor" in found.title


def test_plan_never_imports_torch():
    code = (
        "import sys, trivium.plan.speed; from trivium.plan import devices; devices.this_machine(); "
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_catalog_file_ships_with_package():
    assert devices.CATALOG_FILE.parent == Path(devices.__file__).parent and devices.CATALOG_FILE.is_file()
