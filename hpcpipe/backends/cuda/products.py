"""The rows of the kernel table that are matrix products, done by cuBLASLt; what it refuses is left to our own kernels.

In: calls at their places (``Site``). Out: for each a few steps, products and launches of ours, ready for a capture.

Rows are row-major, cuBLASLt is column-major, so every product is computed transposed. With [r, s]' for the column-major
view of a row-major [s, r] (r rows, leading dimension r):

    linear_fwd  y[n,o]   = x w^T    y'[o,n]   = (w'[c,o])^T x'[c,n]     tn  A = w   B = x    bias along the rows of y'
    linear_dx   dx[n,c]  = dy w     dx'[c,n]  = w'[c,o] dy'[o,n]        nn  A = w   B = dy
    linear_dw   dw[o,c] += dy^T x   dw'[c,o] += x'[c,n] (dy'[o,n])^T    nt  A = x   B = dy   beta 1, float32, in place

A product and the activation beside it are one, where the types are bfloat16: gelu_fwd of what linear_fwd gives is the
epilogue GELU_AUX_BIAS, gelu_dx of what linear_dx gives is DGELU. The library rounds once where two kernels round twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpcpipe.backends.cuda.driver import Driver
from hpcpipe.backends.cuda.launch import Launch, Launcher, Site
from hpcpipe.backends.cuda.launches_products import bias_gradient, loss_rows, loss_total, token_blocks
from hpcpipe.backends.cuda.products_cublaslt import BITS, CublasLt, MatmulStep, Plan, Pointers, Product
from hpcpipe.backends.cuda.products_tune import Tuner
from hpcpipe.backends.null import Tensor

Steps = Sequence[Launch | MatmulStep]
# A linear product and its addresses -> launches that make narrow copies of its operands, the product of these copies
# (see ``narrowed``) and their addresses; None for a product that stays as it is.
Narrow = Callable[[Site, Product, Pointers], tuple[Sequence[Launch], Product, Pointers] | None]
AUX_LD = 8  # cuBLASLt: the leading dimension of what an epilogue writes or reads beside the result


def forward(n: int, o: int, c: int, kind: str) -> Product:
    """y[n,o] = x[n,c] w[o,c]^T: A = w, B = x."""
    return Product("tn", o, n, c, (c, c, o), (kind, kind, kind))


def input_gradient(n: int, o: int, c: int, kind: str) -> Product:
    """dx[n,c] = dy[n,o] w[o,c]: A = w, B = dy."""
    return Product("nn", c, n, o, (c, o, c), (kind, kind, kind))


def weight_gradient(n: int, o: int, c: int, kind: str) -> Product:
    """dw[o,c] += dy[n,o]^T x[n,c], float32: A = x, B = dy."""
    return Product("nt", c, o, n, (c, o, c), (kind, kind, "r"), beta=1)


def narrowed(product: Product, types: tuple[str, str], scales: tuple[str, str]) -> Product:
    """The same product of narrow copies of A and B, both with rows of the depth: all that FP8 on Hopper takes.

    What lies otherwise has to be copied transposed: w in linear_dx, x and dy in linear_dw. ``scales`` are names of
    cublasLtMatmulMatrixScale_t. The result, its type and its epilogue stay.
    """
    k, ld = product.k, product.ld[2]
    return product._replace(ops="tn", ld=(k, k, ld), types=(*types, product.types[2]), scales=scales, tf32=False)


class Products:
    """cuBLASLt for a backend: ``take`` says what it does of the next calls, and how.

    ``temporary`` says of a tensor that only the call after the one that makes it reads it: it need not be written then.
    ``environment`` is where HPCPIPE_TUNE and the cache folder are looked up, os.environ if it is left out.
    """

    def __init__(
        self,
        driver: Driver,
        lt: Any,
        launchers: Mapping[str, Launcher],
        workspace: int,
        temporary: Callable[[Tensor], bool] = lambda tensor: False,
        tf32: bool = False,
        fuse: bool = True,
        narrow: Narrow | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``lt`` are cuBLASLt's bindings (``products_cublaslt.bindings()``), ``launchers`` our kernels by row.

        ``tf32``: float32 products may round their factors to it; ``fuse``: activations may be done by products;
        ``narrow``: what makes FP8 products of linear layers' (a head's with its loss stay as they are).
        """
        self.launchers, self.temporary, self.tf32, self.fuse = launchers, temporary, tf32, fuse
        self.narrow = narrow
        self.library = CublasLt(driver, lt, workspace)
        self.tuner = Tuner(self.library, driver.properties, os.environ if environment is None else environment)
        self._plans: dict[str, Plan] = {}
        self._rows: dict[str, Callable[[Site], Steps | None]] = {
            "linear_fwd": self._linear_fwd,
            "linear_dx": self._linear_dx,
            "linear_dw": self._linear_dw,
            "linearcrossentropy_fwd": self._linearcrossentropy_fwd,
        }

    def take(self, sites: Sequence[Site]) -> tuple[int, Steps] | None:
        """How many of the calls from the first on are done, and how; None where the first is not a product of ours.

        May time products on the device, so not in a capture; what it gives is for one.
        """
        row = self._rows.get(sites[0].call.kernel)
        if row is None:
            return None
        if len(sites) > 1 and (steps := self._pair(sites[0], sites[1])) is not None:
            return 2, steps
        single = row(sites[0])
        return None if single is None else (1, single)

    def table(self) -> dict[str, Any]:
        """The algorithms chosen so far, for other ranks."""
        return self.tuner.table()

    def adopt(self, table: Mapping[str, Any]) -> None:
        """Takes another rank's choices: for products known here and to come, before anything is captured."""
        self.tuner.adopt(table)

    def chosen(self) -> Sequence[str]:
        """What happened, in lines for the banner."""
        refused = sorted(key for key, plan in self._plans.items() if plan.choice is None)
        done = len(self._plans) - len(refused)
        how = "the first proposal for each" if not self.tuner.timing else f"{self.tuner.timed} timed in this run"
        lines = [f"products: cuBLASLt {self.library.version}, {done} shapes, {how}"]
        return lines + [f"products: cuBLASLt refuses {key}; our own kernels instead" for key in refused]

    def close(self) -> None:
        """Gives descriptors, handle and workspace back; no graph with these products may run after it."""
        self.library.close(list(self._plans.values()))
        self._plans.clear()

    def product(self, product: Product, at: Pointers) -> MatmulStep | None:
        """A step for one product, with its algorithm; None where the library does not do it."""
        product = product._replace(align=at.alignment)
        key = product.key
        if key not in self._plans:
            plan = self._plans[key] = self.library.plan(product, at)
            self.tuner.choose(plan)
        plan = self._plans[key]
        return None if plan.choice is None else MatmulStep(self.library, plan, at)

    # --- the rows

    def _kind(self, site: Site) -> tuple[str, bool]:
        """Element type, and whether tensor cores may round float32."""
        return ("h", False) if site.half else ("r", self.tf32)

    def _linear(self, site: Site, product: Product, at: Pointers) -> Steps | None:
        """A product of narrow copies where there is such a one, else the product itself, else None."""
        if self.narrow is not None and (found := self.narrow(site, product, at)) is not None:
            launches, small, places = found
            if (step := self.product(small, places)) is not None:
                return [*launches, step]
        whole = self.product(product, at)
        return None if whole is None else [whole]

    def _linear_fwd(self, site: Site, activation: Site | None = None) -> Steps | None:
        """y = x w^T + b + z, or with an activation site: y, and gelu(y) at the activation's y, at once."""
        size, at, (kind, tf32) = site.size, site.at, self._kind(site)
        product = forward(size["n"], size["o"], size["c"], kind)._replace(tf32=tf32, beta=1 if at["z"] else 0)
        pointers = Pointers(at["w"], at["x"], at["y"], c=at["z"], bias=at["b"])
        epilogue = "BIAS" if at["b"] else "DEFAULT"
        if activation is not None:
            epilogue = "GELU_AUX_BIAS" if at["b"] else "GELU_AUX"
            pointers = pointers._replace(d=activation.at["y"], aux=at["y"])
        return self._linear(site, product._replace(epilogue=epilogue), pointers)

    def _linear_dx(self, site: Site, activation: Site | None = None) -> Steps | None:
        """dx = dy w, or with an activation site: the activation's dx = dx gelu'(x) without dx itself, and its y."""
        size, at, (kind, tf32) = site.size, site.at, self._kind(site)
        product = input_gradient(size["n"], size["o"], size["c"], kind)._replace(tf32=tf32)
        pointers = Pointers(at["w"], at["dy"], at["dx"])
        if activation is None:
            return self._linear(site, product, pointers)
        pointers = pointers._replace(d=activation.at["dx"], aux=activation.at["x"])
        steps = self._linear(site, product._replace(epilogue="DGELU"), pointers)
        return None if steps is None else [*steps, *self.launchers["gelu_fwd"](_again(activation))]

    def _linear_dw(self, site: Site) -> Steps | None:
        size, at, (kind, tf32) = site.size, site.at, self._kind(site)
        n, o, c = size["n"], size["o"], size["c"]
        product = weight_gradient(n, o, c, kind)._replace(tf32=tf32)
        steps = self._linear(site, product, Pointers(at["x"], at["dy"], at["dw"]))
        if steps is None:
            return None
        return [*steps, *(bias_gradient(at["db"], at["dy"], n, o, site.half, site.work) if at["db"] else ())]

    def _linearcrossentropy_fwd(self, site: Site) -> Steps | None:
        """Blocks of r tokens: logits, what the loss makes of them where they lie, dx, and dw by one more addition."""
        at, v, c, (kind, tf32) = site.at, site.size["v"], site.size["c"], self._kind(site)
        steps: list[Launch | MatmulStep] = []
        for block in token_blocks(site):
            x, dx = (at[name] + block.first * c * BITS[kind] // 8 for name in ("x", "dx"))
            products = (
                (forward(block.rows, v, c, kind), Pointers(at["w"], x, at["logits"])),
                (input_gradient(block.rows, v, c, kind), Pointers(at["w"], at["logits"], dx)),
                (weight_gradient(block.rows, v, c, kind), Pointers(x, at["logits"], at["dw"])),
            )
            made = [step for p, where in products if (step := self.product(p._replace(tf32=tf32), where)) is not None]
            if len(made) < len(products):
                return None
            steps += [made[0], loss_rows(site, block), *made[1:]]
        return [*steps, loss_total(site)]

    # --- two calls as one

    def _pair(self, first: Site, second: Site) -> Steps | None:
        """The steps of a product and the activation that follows it, where one product does both; none is narrow."""
        kernels, made = (first.call.kernel, second.call.kernel), first.call.buffers[0]
        if not (self.fuse and first.half and second.half) or made is None or self.narrow is not None:
            return None
        if kernels == ("linear_fwd", "gelu_fwd") and second.call.buffers[1] == made and not first.at["z"]:
            return self._linear_fwd(first, second) if first.size["o"] % AUX_LD == 0 else None
        if kernels == ("linear_dx", "gelu_dx") and second.call.buffers[2] == made and self.temporary(made):
            return self._linear_dx(first, second) if first.size["c"] % AUX_LD == 0 else None
        return None


def _again(site: Site) -> Site:
    """The gelu_fwd that gives the y of a gelu_dx again."""
    _, y, _, x = site.call.buffers
    call = site.call._replace(kernel="gelu_fwd", buffers=(y, x))
    return site._replace(call=call, at={"y": site.at["y"], "x": site.at["x"]})
