"""Linear products in eight bits: a recipe's operands, made narrow beside each product, for cuBLASLt to multiply.

In: a call, its product in bfloat16, and a ``Recipe``. Out: launches that write the copies, and the product of these.
Both factors lie along the depth, which is all that Hopper multiplies: w in dx, and x and dy in dw, are transposed
copies, scaled along their own rows. With A and B as in products.py, each copy is read once, by the product after it:

    linear_fwd  A = w    B = x           linear_dx  A = w^T  B = dy          linear_dw  A = x^T  B = dy^T
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpcpipe.backends.cuda.driver import Driver
from hpcpipe.backends.cuda.launch import Launch, Site
from hpcpipe.backends.cuda.launches_quantize import layout, quantize
from hpcpipe.backends.cuda.products import narrowed
from hpcpipe.backends.cuda.products_cublaslt import Pointers, Product
from hpcpipe.backends.cuda.recipes import Operand, Recipe
from hpcpipe.config import UserError

# Granularity of a recipe -> name of cublasLtMatmulMatrixScale_t.
MODES = {"tensor": "SCALAR_32F", "rows": "VEC128_32F", "blocks": "BLK128x128_32F", "mx": "VEC32_UE8M0"}
# Row -> the table's names of A and B, and whether their copies are transposed.
FACTORS = {
    "linear_fwd": (("w", False), ("x", False)),
    "linear_dx": (("w", True), ("dy", False)),
    "linear_dw": (("x", True), ("dy", True)),
}
SIZES = {"w": ("o", "c"), "x": ("n", "c"), "dy": ("n", "o")}


class NarrowProducts:
    """What ``Products`` asks about each linear product. ``stays`` says of a call whether the recipe leaves it alone.

    The copies lie in memory that all products of a stream share, one after the other; it grows until all are known.
    """

    def __init__(self, driver: Driver, recipe: Recipe, stays: Callable[[Site], bool] = lambda site: False) -> None:
        self.driver, self.recipe, self.stays = driver, recipe, stays
        self._rooms: list[tuple[int, int]] = []  # (bytes, address), the largest last
        operands = (*recipe.fwd, *recipe.dx, *recipe.dw)
        unknown = [o for o in operands if o.format != "bf16" and o.granularity not in MODES]
        if unknown or any(o.rounding != "nearest" or o.hadamard for o in operands):
            raise UserError(
                f"products in {recipe.name} need scales, roundings or rotations that there are no kernels for yet; "
                "take mxfp8, fp8 or bf16"
            )

    def __call__(self, site: Site, product: Product, at: Pointers) -> tuple[Sequence[Launch], Product, Pointers] | None:
        """Launches, product and addresses; None for a call that stays in bfloat16."""
        size, kernel = site.size, site.call.kernel
        operands = self._operands(kernel)
        narrow = site.half and all(o.format != "bf16" for o in operands)
        if not narrow or not self.recipe.takes(size["n"], size["o"], size["c"]) or self.stays(site):
            return None
        needs = []
        for (name, across), operand in zip(FACTORS[kernel], operands, strict=True):
            rows, columns = (size[letter] for letter in SIZES[name])
            needs.append((site.at[name], rows, columns, operand, across))
        start = self._room(sum(layout(n, c, o, 0, not across, across)[1] for _, n, c, o, across in needs))
        launches: list[Launch] = []
        codes, scales = [], []
        for x, n, c, operand, across in needs:
            to, nbytes = layout(n, c, operand, start, not across, across)
            start += nbytes
            launches += quantize(x, n, c, site.half, operand, to)
            codes.append(to.codes_t if across else to.codes)
            own = to.scales_t if across else to.scales
            scales.append(to.whole if operand.granularity == "tensor" else own)
        a, b = operands
        small = narrowed(product, (a.format, b.format), (MODES[a.granularity], MODES[b.granularity]))
        places = at._replace(a=codes[0], b=codes[1], a_scale=scales[0], b_scale=scales[1])
        return launches, small, places

    def close(self) -> None:
        """Gives the memory of the copies back."""
        for _, address in self._rooms:
            self.driver.release(address)
        self._rooms.clear()

    def _operands(self, kernel: str) -> tuple[Operand, Operand]:
        """How A and B are made narrow: a recipe names them as the definitions do, B first."""
        b, a = {"linear_fwd": self.recipe.fwd, "linear_dx": self.recipe.dx, "linear_dw": self.recipe.dw}[kernel]
        return a, b

    def _room(self, nbytes: int) -> int:
        """The address of memory for so many bytes; what was given before stays valid."""
        if not self._rooms or self._rooms[-1][0] < nbytes:
            self._rooms.append((nbytes, self.driver.allocate(nbytes)))
        return self._rooms[-1][1]
