"""Call somebody's function: its framework, its argument names, its layout, its mask convention.

A :class:`Foreign` takes arguments in the words of this library, as NumPy arrays, and answers with
NumPy arrays; whatever the function does to its inputs, returns or raises is turned into data.
"""

import functools
import inspect
import warnings
from typing import NamedTuple

import numpy as np

from attention_ref.core import check as door
from attention_ref.core.errors import ParameterError
from attention_ref.kit import lowp, tree
from attention_ref.kit.inputs import is_float

FRAMEWORKS = ("numpy", "torch", "jax", "cupy")
LAYOUTS = ("BHTD", "BTHD", "HTD", "TD")

ALIASES = {
    "q": ("q", "query", "queries", "Q", "xq", "query_states", "query_layer", "qs"),
    "k": ("k", "key", "keys", "K", "xk", "key_states", "key_layer", "ks"),
    "v": ("v", "value", "values", "V", "xv", "value_states", "value_layer", "vs"),
    "mask": ("mask", "attn_mask", "attention_mask", "keep", "key_mask"),
    "causal": ("causal", "is_causal", "use_causal_mask"),
    "scale": ("scale", "softmax_scale", "sm_scale", "scaling", "temperature_scale"),
    "softcap": ("softcap", "soft_cap", "logits_soft_cap", "logit_softcap", "softcapping"),
    "bias": ("bias", "attn_bias", "attention_bias"),
    "align": ("align",),
    "b": ("b", "beta"),
    "gate": ("gate", "g"),
    "state": ("state", "initial_state", "h0"),
}
"""Our argument -> names under which other projects have it; the first that fits is used."""

SDPA = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "bias": "attn_mask",
        "causal": "is_causal", "scale": "scale"}  # fmt: skip
"""PyTorch's compiled function has no signature to read; its bias is a mask of floats."""


class Answer(NamedTuple):
    """What a call gave, as NumPy arrays in our layout."""

    outs: list  # arrays in the order returned; the first is the output
    gradients: dict | None  # argument -> array, or None where none arrived; None without any
    dtype: str  # of the output as it came
    modified: tuple  # arguments that the call wrote into
    note: str  # why there are no gradients


class Refusal(Exception):
    """The function raised, or returned what cannot be compared."""

    @property
    def verdict(self):
        """ "not supported" for what reads as a refusal, "WRONG" for a crash."""
        kinds = (NotImplementedError, ValueError, TypeError, AssertionError, RuntimeError)
        cause = self.__cause__
        refused = cause is None or (isinstance(cause, kinds) and not isinstance(cause, BadReturn))
        return "not supported" if refused else "WRONG"


class BadReturn(TypeError):
    """The function returned something else than arrays."""


# ------------------------------------------------------------------------------ guessing


def unwrap(fn):
    """The innermost function behind partial objects and decorators."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.unwrap(fn) if callable(fn) else fn


def framework_of(fn):
    """The framework of a function: its module, its class, or what its code names; else NumPy."""
    inner = unwrap(fn)
    modules = [getattr(inner, "__module__", None) or ""]
    modules += [c.__module__ for c in type(inner).__mro__]
    for module in modules:
        known = _known(module)
        if known:
            return known
    if getattr(inner, "__qualname__", "") == "scaled_dot_product_attention":
        return "torch"
    for function in (inner, *(vars(type(inner)).get(n) for n in ("forward", "__call__"))):
        code = getattr(function, "__code__", None)
        if code is None:
            continue
        found = _from_code(code, getattr(function, "__globals__", {}), function)
        if found:
            return found
    return "numpy"


def _known(name):
    top = str(name).split(".")[0].lstrip("_")
    top = {"jaxlib": "jax", "jnp": "jax", "triton": "torch", "flash_attn": "torch",
           "functorch": "torch", "flax": "jax"}.get(top, top)  # fmt: skip
    return top if top in ("torch", "jax", "cupy") else None


def _from_code(code, names, function, deep=2):
    """The framework whose objects the code of a function names, or that of what it calls."""
    values = dict(names)
    cells = getattr(function, "__closure__", None) or ()
    for free, cell in zip(code.co_freevars, cells, strict=False):
        try:
            values[free] = cell.cell_contents
        except ValueError:  # an empty cell
            continue
    used = [*code.co_names, *code.co_freevars]
    for const in code.co_consts:
        used += getattr(const, "co_names", ())
    helpers = []
    for name in used:
        value = values.get(name, name)
        module = getattr(value, "__name__", "") if inspect.ismodule(value) else ""
        module = module or getattr(value, "__module__", None) or (name if value is name else "")
        found = _known(module) or _known(type(value).__module__)
        if found:
            return found
        if inspect.isfunction(value) and value is not function:
            helpers.append(value)
    for helper in helpers if deep else ():
        found = _from_code(helper.__code__, helper.__globals__, helper, deep - 1)
        if found:
            return found
    return None


def signature_of(fn):
    """Parameters of a function by name, or None where they cannot be read."""
    if hasattr(fn, "forward") and not inspect.isfunction(fn) and framework_of(fn) == "torch":
        fn = fn.forward
    try:
        return inspect.signature(fn).parameters
    except (TypeError, ValueError):
        arguments = getattr(getattr(fn, "schema", None), "arguments", None)  # TorchScript
        if arguments is None:
            return None
        made = [
            inspect.Parameter(a.name, inspect.Parameter.POSITIONAL_OR_KEYWORD,
                              default=a.default_value if a.has_default_value()
                              else inspect.Parameter.empty) for a in arguments
        ]  # fmt: skip
        return {p.name: p for p in made}


def names_of(fn, names, ours):
    """Our names -> theirs: from the caller, a known function, or the signature.

    Parameters
    ----------
    fn : callable
        Theirs.
    names : dict or None
        What the caller says.
    ours : sequence of str
        Our argument names, in order; the required ones are matched by place where no name fits.

    Returns
    -------
    dict

    Raises
    ------
    ParameterError
        When the signature cannot be read.
    """
    if getattr(unwrap(fn), "__name__", "") == "scaled_dot_product_attention" and names is None:
        return dict(SDPA)
    if names is not None:
        return dict(names)
    parameters = signature_of(fn)
    if parameters is None:
        raise ParameterError(
            "names is needed: the function has no readable signature; "
            "hint: names={'q': 'query', 'k': 'key', 'v': 'value', ...}"
        )
    usable = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    found = {}
    for name in ours:
        fitting = [a for a in (name, *ALIASES.get(name, ())) if a in usable]
        if fitting and fitting[0] not in found.values():
            found.setdefault(name, fitting[0])
    free = [n for n in usable if n not in found.values()
            and parameters[n].default is inspect.Parameter.empty]  # fmt: skip
    for name in [n for n in ours if n in ("q", "k", "v") and n not in found]:
        if free:
            found[name] = free.pop(0)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        found = {n: n for n in "qkv" if n in ours} | found
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        found |= {n: n for n in ours if n not in found}
    return found | {n: n for n in usable if n not in found.values()}


# ------------------------------------------------------------------------------ calling


class Foreign:
    """A function under its own names, layout and conventions, called in ours."""

    def __init__(self, fn, framework, layout, names, fixed, backward, conventions, device=None):
        self.device = device
        self.fn, self.framework, self.layout, self.names = fn, framework, layout, names
        self.fixed, self.backward = fixed, backward
        self.compiled = {}  # JAX: options -> compiled call
        self.mask_rule = conventions.get("mask", "attend")
        parameters = signature_of(fn) or {}
        self.positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
        any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
        if any_number and not set(parameters) & set(names.values()):
            self.positional = [names[n] for n in "qkv" if n in names]

    def lacks(self, kwargs):
        """Arguments of a case that the function does not have."""
        return [n for n, a in kwargs.items() if a is not None and not self.names.get(n)]

    @property
    def differentiates(self):
        """Whether gradients can be asked for."""
        return self.framework in ("torch", "jax") or self.backward is not None

    def __call__(self, given, dout=None, dtype="float64", how="plain"):
        """Output and gradients for arguments in our words.

        Parameters
        ----------
        given : dict
            Arguments; floating arrays are rounded to the dtype here.
        dout : ndarray, optional
            Upstream gradient of the output; without it no gradients are computed.
        dtype : str
            "float64", "float32", "float16" or "bfloat16".
        how : {"plain", "strided", "read-only"}
            As contiguous arrays, as views that are not, or (NumPy) as arrays not to be written.

        Returns
        -------
        Answer

        Raises
        ------
        Refusal
            Whatever the function raises.
        """
        if self.layout in ("HTD", "TD"):
            return self._one_by_one(given, dout, dtype, how)
        heads = set("qkv") if self.layout == "BTHD" else set()
        ready, both = {}, None
        for name, a in self._masked(given).items():
            a = _swap(a) if name in heads and isinstance(a, np.ndarray) and a.ndim > 2 else a
            ready[self.names[name]] = a
        if self.names.get("bias") and self.names.get("bias") == self.names.get("mask"):
            both = given.get("bias")
        upstream = dout if dout is None or not heads or dout.ndim < 3 else _swap(dout)
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # theirs; what they did wrong shows in numbers
                answer = self._call(ready, upstream, dtype, how)
        except Exception as failure:
            raise Refusal(_told(failure)) from failure
        theirs = {t: n for n, t in self.names.items() if n in given and not (
            n == "mask" and both is not None)}  # fmt: skip
        outs = [_swap(a) if heads and a.ndim > 2 and i == 0 else a
                for i, a in enumerate(answer.outs)]  # fmt: skip
        gradients = answer.gradients
        if gradients is not None:
            gradients = {theirs.get(n, n): g for n, g in gradients.items()}
            gradients = {
                n: _swap(g) if n in heads and isinstance(g, np.ndarray) and g.ndim > 2 else g
                for n, g in gradients.items()
            }
        modified = tuple(theirs.get(n, n) for n in answer.modified)
        return answer._replace(outs=outs, gradients=gradients, modified=modified)

    def _masked(self, given):
        """The mask in their convention; a bias that shares its argument joins it."""
        given = dict(given)
        mask, bias = given.get("mask"), given.get("bias")
        shared = self.names.get("bias") and self.names.get("bias") == self.names.get("mask")
        if shared and bias is not None:
            if mask is not None:
                given["bias"] = np.where(mask, bias, -np.inf)
                del given["mask"]
        elif mask is not None and self.mask_rule == "blocked":
            given["mask"] = ~mask
        elif mask is not None and self.mask_rule == "additive":
            given["mask"] = np.where(mask, 0.0, -np.inf)
        return given

    def _arguments(self, ready):
        """Positional and keyword arguments; those of ``fixed`` last."""
        ready = ready | self.fixed
        return [ready.pop(n) for n in self.positional if n in ready], ready

    def _call(self, ready, dout, dtype, how):
        if self.framework == "torch":
            return self._torch(ready, dout, dtype, how)
        if self.framework == "jax":
            return self._jax(ready, dout, dtype)
        return self._numpy(ready, dout, dtype, how)

    def _numpy(self, ready, dout, dtype, how):
        if self.framework == "cupy":
            import cupy as xp
        else:
            xp = np
        made = {}
        for n, a in ready.items():
            if is_float(a):
                a = _presented(_to_dtype(a, dtype), how)
            made[n] = xp.asarray(a) if isinstance(a, np.ndarray) else a
        before = {n: _own(a) for n, a in made.items() if hasattr(a, "shape")}
        args, kwargs = self._arguments(made)
        result, cache = self.fn(*args, **kwargs), None
        if self.backward is not None:
            if not isinstance(result, (tuple, list)) or len(result) != 2:
                raise BadReturn(f"it returned {type(result).__name__}, expected (out, cache): "
                                "a backward was given")  # fmt: skip
            result, cache = result
        outs = _arrays(result)
        gradients, note = None, "a NumPy function without backward="
        if dout is not None and self.backward is not None:
            upstream = xp.asarray(_to_dtype(dout, dtype))
            first = next(iter(tree.flatten(result)), "out")
            try:
                gradients = self.backward(tree.like(result, {first: upstream}), cache)
                gradients, note = self._named(gradients, ready), ""
            except Exception as failure:
                note = f"the backward raised {describe(failure)}"
        modified = [n for n, a in before.items() if not _same(a, made.get(n))]
        return Answer(outs, gradients, _dtype_name(outs, result), tuple(modified), note)

    def _named(self, gradients, ready):
        """Gradients under their names: a dict, or a tuple in the order of the arguments."""
        if isinstance(gradients, dict):
            back = {n: t for n, t in self.names.items()}
            return {
                back.get(n, n): None if g is None else to_numpy(g) for n, g in gradients.items()
            }
        owed = [n for n, a in ready.items() if is_float(a)]
        parts = gradients if isinstance(gradients, (tuple, list)) else [gradients]
        return {n: None if g is None else to_numpy(g) for n, g in zip(owed, parts, strict=False)}

    def _torch(self, ready, dout, dtype, how):
        import torch

        kind = getattr(torch, dtype)
        leaves, made = {}, {}
        for n, a in ready.items():
            if not isinstance(a, np.ndarray):
                made[n] = a
            elif not is_float(a):
                made[n] = torch.tensor(np.ascontiguousarray(a)).to(self.device)
            else:
                t = torch.tensor(np.ascontiguousarray(a)).to(self.device, kind)
                leaves[n] = t.requires_grad_(dout is not None)
                made[n] = t.clone() if dout is not None else t
                if how == "strided" and t.ndim > 1:
                    turned = made[n].transpose(-1, -2).contiguous()
                    made[n] = turned.transpose(-1, -2)
        before = {n: t.detach().clone() for n, t in made.items() if hasattr(t, "detach")}
        args, kwargs = self._arguments(made)
        result = self.fn(*args, **kwargs)
        outs, note = _arrays(result), ""
        modified = tuple(
            n for n, t in before.items()
            if not torch.equal(torch.nan_to_num(t), torch.nan_to_num(made[n].detach()))
        )  # fmt: skip
        name = _dtype_name(outs, result)
        if dout is None:
            return Answer(outs, None, name, modified, note)
        out = first(result)
        if not getattr(out, "requires_grad", False):
            note = "the output is not connected to the inputs: no autograd"
            return Answer(outs, None, name, modified, note)
        try:
            out.backward(torch.tensor(np.ascontiguousarray(dout)).to(out))
        except Exception as failure:
            return Answer(outs, None, name, modified, f"the backward raised {describe(failure)}")
        gradients = {n: None if t.grad is None else to_numpy(t.grad) for n, t in leaves.items()}
        return Answer(outs, gradients, name, modified, note)

    def _jax(self, ready, dout, dtype):
        import jax

        arrays = {n: a for n, a in ready.items() if isinstance(a, np.ndarray)}
        rest = {n: a for n, a in ready.items() if n not in arrays}

        def run(made, others, upstream):
            def value(made):
                args, kwargs = self._arguments(made | others | rest)
                result = self.fn(*args, **kwargs)
                return first(result), result

            if upstream is None:
                return value(made)[1], None
            out, pull, result = jax.vjp(value, made, has_aux=True)
            return result, pull(upstream.astype(out.dtype))[0]

        with jax.enable_x64(True):
            made = {n: jax.numpy.asarray(_to_dtype(a, dtype)) for n, a in arrays.items()
                    if is_float(a)}  # fmt: skip
            others = {n: jax.numpy.asarray(a) for n, a in arrays.items() if n not in made}
            upstream = None if dout is None else jax.numpy.asarray(dout)
            # one compilation a shape; kept by the options, which are constants in it
            compiled = self.compiled.setdefault(repr((rest, dout is None)), jax.jit(run))
            try:
                result, gradients = compiled(made, others, upstream)
            except Exception:  # branches on values, or returns what is no array
                result, gradients = run(made, others, upstream)
            outs = _arrays(result)
            if gradients is not None:
                gradients = {n: to_numpy(g) for n, g in gradients.items()}
            return Answer(outs, gradients, _dtype_name(outs, result), (), "")

    def _one_by_one(self, given, dout, dtype, how):
        """A function of one head (TD) or one sequence (HTD), called for each and put together."""
        inner = Foreign(self.fn, self.framework, "BHTD", self.names, self.fixed, self.backward,
                        {"mask": self.mask_rule}, self.device)  # fmt: skip
        axes = 2 if self.layout == "TD" else 3
        lead = given["q"].shape[:-axes]
        if any(given[n].shape[:-axes] != lead for n in "kv" if n in given):
            raise Refusal(f"layout {self.layout} has no grouped heads")
        T, S = given["q"].shape[-2], given["k"].shape[-2]
        full = (*given["q"].shape[:-2], T, S)
        wide = {n: np.broadcast_to(a, full) for n, a in given.items()
                if n in ("mask", "bias") and isinstance(a, np.ndarray)}  # fmt: skip
        answers = []
        for place in np.ndindex(*lead):
            part = {n: a[place] if n in "qkv" or n in wide else a
                    for n, a in (given | wide).items()}  # fmt: skip
            answers.append(inner(part, None if dout is None else dout[place], dtype, how))

        def together(parts):
            return np.stack(parts).reshape(*lead, *parts[0].shape)

        one = answers[0]
        outs = [together([x.outs[i] for x in answers]) for i in range(len(one.outs))]
        gradients = None
        if one.gradients is not None:
            gradients = {}
            for n in one.gradients:
                parts = [x.gradients.get(n) for x in answers]
                if any(g is None for g in parts):
                    gradients[n] = None
                elif n in "qkv":
                    gradients[n] = together(parts)
                elif n in wide:
                    gradients[n] = _sum_to(together(parts), given[n].shape)
                else:
                    gradients[n] = sum(parts)
        return Answer(outs, gradients, one.dtype, one.modified, one.note)


def _sum_to(dx, shape):
    dx = np.sum(dx, axis=tuple(range(dx.ndim - len(shape))))
    return np.sum(dx, tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def _told(failure):
    return str(failure) if isinstance(failure, BadReturn) else f"it raised {describe(failure)}"


def describe(failure):
    """An exception in one line."""
    lines = str(failure).splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0][:100]}".rstrip(": ")


def first(result):
    """The output: the first of a tuple or of a dict, the field ``out``, or the thing itself."""
    if hasattr(result, "_fields"):
        return getattr(result, "out", result[0])
    if isinstance(result, (tuple, list)) and _several(result):
        return result[0] if result else None
    if isinstance(result, dict):
        return result.get("out", next(iter(result.values()), None))
    for name in ("out", "output", "last_hidden_state"):
        if not hasattr(result, "shape") and hasattr(result, name):
            return getattr(result, name)
    return result


def _several(result):
    """Whether a tuple or list holds arrays, and is not itself one of numbers."""
    return isinstance(result, tuple) or any(hasattr(x, "shape") for x in result) or not result


def _arrays(result):
    """Everything returned, output first, as NumPy arrays; what is no array is left out."""
    head = first(result)
    rest = []
    if isinstance(result, (tuple, list)) and _several(result):
        rest = [x for x in result if x is not head]
    elif isinstance(result, dict):
        rest = [x for x in result.values() if x is not head]
    if head is None or not (hasattr(head, "shape") or isinstance(head, list) or np.isscalar(head)):
        raise BadReturn(f"it returned {type(head).__name__}, expected an array")
    found = [to_numpy(head)] + [to_numpy(x) for x in rest if hasattr(x, "shape")]
    if found[0].dtype.kind not in "fiub":
        raise BadReturn(f"it returned {found[0].dtype}, expected real numbers")
    return [a for a in found if a.dtype.kind in "fiub"]


def to_numpy(x):
    """Any framework's array as a NumPy array of its own; bfloat16 as float32."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if str(x.dtype) == "torch.bfloat16" else x
        return np.array(x.numpy())
    if str(getattr(x, "dtype", "")) == "bfloat16":
        return np.array(x, dtype=np.float32)
    if isinstance(x, list) and x and all(isinstance(row, (list, set)) for row in x):
        most = max(len(row) for row in x)  # kept indices, as many as there are; sets too
        if any(isinstance(row, set) or len(row) < most for row in x):
            x = [[*sorted(row), *[-1] * (most - len(row))] for row in x]
    return np.array(x.get() if hasattr(x, "get") and hasattr(x, "device") else x)


def _dtype_name(outs, result):
    kind = getattr(first(result), "dtype", None)
    return str(kind).removeprefix("torch.") if kind is not None else str(outs[0].dtype)


def _to_dtype(a, dtype):
    if dtype != "bfloat16":
        return a.astype(dtype)
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError("NumPy has no bfloat16 without the package ml_dtypes") from None
    return lowp.round_to(a, dtype).astype(ml_dtypes.bfloat16)


def _own(a):
    return a.copy()


def _same(a, b):
    a, b = to_numpy(a), to_numpy(b)
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _presented(a, how):
    """The same numbers in another guise."""
    if how == "strided" and a.ndim:
        wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::2] = a
        return wide[..., ::2]
    a = a.copy()
    a.flags.writeable = how != "read-only"
    return a


def _swap(a):
    return np.ascontiguousarray(np.swapaxes(a, -2, -3))


def check_options(framework, layout, conventions):
    """Refuse unknown frameworks, layouts and conventions."""
    door.option("framework", framework, FRAMEWORKS)
    door.option("layout", layout, LAYOUTS)
    choices = {
        "align": ("lower_right", "upper_left"), "empty_row": ("zero", "nan", "uniform", "raise"),
        "same_width": (True, False), "precision": ("float16", "float32", "float64", "bfloat16"),
        "mask": ("attend", "blocked", "additive"),
    }  # fmt: skip
    for name, value in conventions.items():
        door.option("conventions", name, tuple(choices))
        door.option(f"conventions[{name!r}]", value, choices[name])
