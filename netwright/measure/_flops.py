"""How many additions and multiplications an operation of PyTorch's dispatcher makes in products."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

# Names of operations that sum products. What bears one of them and has no formula is said to be
# uncounted; so is every operation that is not PyTorch's own, since nobody knows what is in it.
_PRODUCTS = re.compile(
    r"""(^|_)(mm|addmm|bmm|baddbmm|addbmm|mv|addmv|dot|vdot|ger|addr|matmul)(_|$)
    | conv(olution|[123]d|_|$) | (^|_)linear(_|$) | attention(_|$) | trilinear$ | transformer
    | (^|_)(rnn|lstm|gru)(_|$) | (^|_)(fft|cdist|pdist|geqrf|ormqr|orgqr) | cholesky
    | triangular_solve | linalg_(?!cross|check_errors|vector_norm)""", re.VERBOSE)
_ELEMENTWISE = re.compile(r"^_?thnn_fused_|^_linalg_check|^_fused_sdp_choice")
_OWN = {"aten", "prim", "prims", "quantized", "mkldnn", "onednn", "mkl", "c10d", "_c10d_functional"}

Formula = Callable[[dict[str, Any], Any], float]


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """Return the additions and multiplications of the products in one operation, else None.

    None is returned of an operation that sums products (or may, when it is not PyTorch's own)
    and has no formula here.
    """
    name = operation(func)
    formula = _FORMULAS.get(name)
    if formula is not None:
        arguments = {a.name: a.default_value for a in func._schema.arguments}
        arguments.update(zip(arguments, args, strict=False))
        arguments.update(kwargs)
        found = formula(arguments, out)
        return None if math.isnan(found) else round(found)
    registered = flop_counter.flop_registry.get(getattr(func, "_overloadpacket", func))
    if registered is not None:
        return int(registered(*args, **kwargs, out_val=out))
    space, _, bare = name.rpartition(".")
    if space not in _OWN:
        return None
    return None if _PRODUCTS.search(bare) and not _ELEMENTWISE.search(bare) else 0


def operation(func: Any) -> str:
    """Return the name of an operation with its library, the same in place and out of place."""
    return str(getattr(func, "_overloadpacket", func)).rstrip("_")


def _product(first: Tensor, second: Tensor) -> float:
    """A matrix, or a batch of them, by a matrix, a batch, or a vector."""
    columns = second.shape[-1] if second.dim() > 1 else 1
    if first.layout != torch.strided and second.layout != torch.strided:
        return math.nan  # what is summed depends on where both have their entries
    if first.layout != torch.strided:
        return 2 * _stored(first) * columns
    if second.layout != torch.strided:
        return 2 * _stored(second) * first.shape[-2]
    return 2 * first.numel() * columns


def _stored(sparse: Tensor) -> int:
    values = sparse._values() if sparse.layout == torch.sparse_coo else sparse.values()
    return values.numel()


def _of(first: str, second: str) -> Formula:
    return lambda a, out: _product(a[first], a[second])


def _rows_by_weight(a: dict[str, Any], out: Any) -> float:
    """A dense layer, whatever form its weight is packed in: the first argument's rows by it."""
    rows = next(iter(a.values()))
    return 2 * out.numel() * rows.shape[-1]


def _grouped(a: dict[str, Any], out: Any) -> float:
    first, second = a["self"], a["mat2"]
    if first.dim() == second.dim() == 2:  # groups along what is summed over
        return 2 * first.numel() * second.shape[-1]
    return 2 * out.numel() * first.shape[-1]


def _convolution(a: dict[str, Any], out: Any) -> float:
    """Every output position sums over the kernel; transposed, every input position spreads it."""
    return _kernel(a, a["input"].shape if a["transposed"] else out.shape)


def _convolution_backward(a: dict[str, Any], out: Any) -> float:
    shape = a["input"].shape if a["transposed"] else a["grad_output"].shape
    return sum(a["output_mask"][:2]) * _kernel(a, shape)


def _kernel(a: dict[str, Any], positions: torch.Size) -> float:
    weight = a["weight"]
    batch = positions[0] if len(positions) == weight.dim() else 1
    return 2 * batch * math.prod(positions[2 - weight.dim():]) * weight.numel()


def _attention(a: dict[str, Any], out: Any) -> float:
    return 2 * _scores(a) * (a["query"].shape[-1] + a["value"].shape[-1])


def _attention_backward(a: dict[str, Any], out: Any) -> float:
    """The scores once more, and the gradients of scores, values, queries and keys."""
    return 2 * _scores(a) * (3 * a["query"].shape[-1] + 2 * a["value"].shape[-1])


def _scores(a: dict[str, Any]) -> int:
    return math.prod(a["query"].shape[:-1]) * a["key"].shape[-2]


def _encoder_layer(a: dict[str, Any], out: Any) -> float:
    weights = ("qkv_weight", "proj_weight", "ffn_weight_1", "ffn_weight_2")
    return _per_token(a, a["src"], weights)


def _fused_attention(a: dict[str, Any], out: Any) -> float:
    if a["key"].shape != a["query"].shape:
        return math.nan
    return _per_token(a, a["query"], ("qkv_weight", "proj_weight"))


def _per_token(a: dict[str, Any], x: Tensor, weights: tuple[str, ...]) -> float:
    rows = list(x.unbind()) if x.is_nested else list(x)
    tokens = sum(row.shape[0] for row in rows)
    products = 2 * tokens * sum(a[name].numel() for name in weights)
    return products + 4 * a["embed_dim"] * sum(row.shape[0] ** 2 for row in rows)


def _recurrent(first: str, second: str, passes: int) -> Formula:
    """One layer in one direction: each token by the input's and by the state's weights."""
    return lambda a, out: passes * _tokens(a) * 2 * (a[first].numel() + a[second].numel())


def _cudnn_recurrent(passes: int) -> Formula:
    def formula(a: dict[str, Any], out: Any) -> float:
        return passes * _tokens(a) * 2 * sum(w.numel() for w in a["weight"] if w.dim() == 2)
    return formula


def _tokens(a: dict[str, Any]) -> int:
    return a["input"].numel() // a["input"].shape[-1]


def _trilinear(a: dict[str, Any], out: Any) -> float:
    """The first two are multiplied and summed where the third has no axis, then the third."""
    rank = a["i1"].dim() + len(a["expand1"])
    shapes = []
    for i in "123":
        shape = list(a[f"i{i}"].shape)
        for axis in sorted(a[f"expand{i}"]):
            shape.insert(axis, 1)
        shapes.append(shape)
    joined = [max(first, second) for first, second in zip(*shapes[:2], strict=True)]
    gone = {axis % rank for axis in a["sumdim"]} & {axis % rank for axis in a["expand3"]}
    left = [1 if axis in gone else n for axis, n in enumerate(joined)]
    whole = [max(n, third) for n, third in zip(left, shapes[2], strict=True)]
    return 2 * (math.prod(joined) + math.prod(whole))


def _factor(share: float, matrix: str = "self") -> Formula:
    """A factorisation or an inverse: `share` n^3 for each matrix of the batch."""
    return lambda a, out: share * a[matrix].numel() * a[matrix].shape[-1]


def _solve(share: float, matrix: str, right: str) -> Formula:
    """A solve by triangles: `share` n^2 for each column of the right side."""
    return lambda a, out: share * a[right].numel() * a[matrix].shape[-1]


def _factor_and_solve(a: dict[str, Any], out: Any) -> float:
    return _factor(2 / 3, "A")(a, out) + _solve(2, "A", "B")(a, out)


def _lu(matrix: str) -> Formula:
    """Factors of m by n: m n^2 - n^3 / 3, with n the shorter side."""
    def formula(a: dict[str, Any], out: Any) -> float:
        *batch, rows, columns = a[matrix].shape
        long, short = max(rows, columns), min(rows, columns)
        return math.prod(batch) * (long * short ** 2 - short ** 3 / 3)
    return formula


_FORMULAS: dict[str, Formula] = {
    "aten.mm": _of("self", "mat2"),
    "aten._sparse_mm": _of("sparse", "dense"),
    "aten.bmm": _of("self", "mat2"),
    "aten.addmm": _of("mat1", "mat2"),
    "aten._addmm_activation": _of("mat1", "mat2"),
    "aten._sparse_addmm": _of("mat1", "mat2"),
    "aten.baddbmm": _of("batch1", "batch2"),
    "aten.addbmm": _of("batch1", "batch2"),
    "aten.mv": _of("self", "vec"),
    "aten.addmv": _of("mat", "vec"),
    "aten.addr": lambda a, out: 2 * out.numel(),
    "aten.dot": lambda a, out: 2 * a["self"].numel(),
    "aten.vdot": lambda a, out: 2 * a["self"].numel(),
    "aten._int_mm": _of("self", "mat2"),
    "aten._weight_int8pack_mm": _rows_by_weight,
    "aten._weight_int4pack_mm": _rows_by_weight,
    "aten._weight_int4pack_mm_for_cpu": _rows_by_weight,
    "aten._dyn_quant_matmul_4bit": _rows_by_weight,
    "aten._scaled_mm": _of("self", "mat2"),
    "aten._grouped_mm": _grouped,
    "aten._scaled_grouped_mm": _grouped,
    "aten.sparse_sampled_addmm":
        lambda a, out: 2 * _stored(a["self"]) * a["mat1"].shape[-1],
    "quantized.linear": _rows_by_weight,
    "quantized.linear_relu": _rows_by_weight,
    "quantized.linear_dynamic": _rows_by_weight,
    "quantized.linear_relu_dynamic": _rows_by_weight,
    "quantized.linear_dynamic_fp16": _rows_by_weight,
    "onednn.qlinear_pointwise": _rows_by_weight,
    "mkldnn._linear_pointwise": _rows_by_weight,
    "mkl._mkl_linear": _rows_by_weight,
    "aten.convolution": _convolution,
    "aten._convolution": _convolution,
    "aten.convolution_overrideable": _convolution,
    "aten.convolution_backward": _convolution_backward,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "aten._transformer_encoder_layer_fwd": _encoder_layer,
    "aten._native_multi_head_attention": _fused_attention,
    "aten.mkldnn_rnn_layer": _recurrent("weight0", "weight1", 1),
    "aten.mkldnn_rnn_layer_backward": _recurrent("weight1", "weight2", 2),
    "aten._cudnn_rnn": _cudnn_recurrent(1),
    "aten._cudnn_rnn_backward": _cudnn_recurrent(2),
    "aten._trilinear": _trilinear,
    "aten.cholesky": _factor(1 / 3),
    "aten.linalg_cholesky_ex": _factor(1 / 3),
    "aten.cholesky_inverse": _factor(2 / 3),
    "aten.linalg_inv_ex": _factor(2, "A"),
    "aten.linalg_lu": _lu("A"),
    "aten.linalg_lu_factor_ex": _lu("A"),
    "aten._linalg_det": _lu("A"),
    "aten._linalg_slogdet": _lu("A"),
    "aten.linalg_solve_triangular": _solve(1, "self", "B"),
    "aten.triangular_solve": _solve(1, "A", "self"),
    "aten.cholesky_solve": _solve(2, "input2", "self"),
    "aten.linalg_lu_solve": _solve(2, "LU", "B"),
    "aten._linalg_solve_ex": _factor_and_solve,
}
