"""What each of several devices holds of weights, gradients and moments, by strategy. Never imports torch.

Sources: Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Zhao et al. 2023, arXiv:2304.11277 (FSDP); Li et al. 2020,
arXiv:2006.15704 (DDP). Written from their documents and not measured: this version trains on one device.
"""

from dataclasses import dataclass

from trivium.plan.workload import FP32_BYTES, Workload

DDP_BUCKET_BYTES = 25 << 20
ZERO_BUCKET_BYTES = 500_000_000  # DeepSpeed's reduce and gather buckets, of 5e8 values by default, at half of that


@dataclass(frozen=True)
class Share:
    """What one device holds.

    Attributes:
        weight_bytes: bytes of trained weights, for each parameter of the whole model.
        frozen: share of the frozen weights.
        gradient_bytes: bytes of gradients for each trained parameter.
        moments: share of the moments.
        buffer_bytes: gathered weights and buckets of the communication.
    """

    weight_bytes: float
    frozen: float
    gradient_bytes: float
    moments: float
    buffer_bytes: float


def share_of(w: Workload) -> Share:
    """The share of one device; all of it where there is one."""
    size, fp32 = w.dtype_bytes, FP32_BYTES
    on_device = 0.0 if w.offload != "none" or (w.state_dtype == "paged-8bit" and w.place == "gpu") else 1.0
    if w.num_devices == 1:
        # With offload the masters go to the host, and what computes stays in the compute dtype.
        weights = fp32 if w.offload == "none" else float(size)
        return Share(weights, 1.0, fp32 if w.offload == "none" else float(size), on_device, 0.0)
    part = 1.0 / w.num_devices
    if w.strategy == "ddp":
        return Share(fp32, 1.0, fp32, on_device, 2 * DDP_BUCKET_BYTES)
    if w.strategy == "zero2":
        masters = fp32 * part if w.offload == "none" else 0.0
        return Share(size + masters, 1.0, size * part, on_device * part, 2 * ZERO_BUCKET_BYTES)
    # FSDP2 and ZeRO-3: two layers and the tables are whole at a time, and one layer's gradients.
    shape = w.shape
    trains_all = w.adapter is None
    layer, tables = shape.num_layer_matmul_params, shape.num_embedding_params
    gathered = size * (2 * layer + tables) + (fp32 * layer if trains_all else 0)
    resident = 0.0 if w.offload == "all" else part
    if w.strategy == "zero3":
        masters = fp32 * part if w.offload == "none" else 0.0
        return Share(size * resident + masters, resident, size * part, on_device * part, gathered)
    weights = 0.0 if w.offload != "none" else fp32 * part
    return Share(weights, resident, fp32 * part, on_device * part, gathered)
