/* hpcpipe.h: the native contract, one prototype per kernel.
 *
 * Every prototype below is held against hpcpipe/backends/kernels.py by tests/kernels. Letters: n tokens of a microbatch
 * (b sequences of t), c channels in, o channels out, f feed-forward width, v vocabulary, s learned positions, h query
 * heads, k key/value heads, d head width. All matrices are row-major and dense; weights are [out, in]. `d*` names are
 * gradients; a parameter gradient is accumulated (+=), an activation gradient is written.
 *
 * Determinism: a kernel gives the same bits for any number of threads. Nothing here allocates after hp_init.
 */
#ifndef HPCPIPE_H
#define HPCPIPE_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A recorded call: a kernel and its arguments. A buffer argument lies at arena + bases[region] + value.i; region -1
 * marks an absent optional buffer; scalars leave region at -2. */
#define HP_MAX_ARGS 16
typedef struct { int64_t region; union { int64_t i; double r; } value; } hp_arg;
typedef struct { int64_t kernel; hp_arg args[HP_MAX_ARGS]; } hp_call;

static inline void *hp_pointer(const hp_arg *a, char *arena, const int64_t *bases) {
  return a->region < 0 ? NULL : arena + bases[a->region] + a->value.i;
}

const char *hp_table_digest(void);          /* names the kernel table this library was generated from */
void hp_init(int threads);                  /* team size, flush-to-zero in every thread */
int hp_threads(void);
void hp_dispatch(const hp_call *call, char *arena, const int64_t *bases, void *work);
/* Walks a recording with a team of `threads`. `work` (arena offset, negative for none) is scratch for all calls. */
void hp_run(const hp_call *calls, int64_t n, char *arena, const int64_t *bases, int64_t work, int threads);
double hp_matmul_peak(double seconds);      /* FLOP/s of float32 products on this team, measured now */

void hp_linear_fwd(float *y, const float *x, const float *w, const float *b, const float *z, int64_t n, int64_t o,
    int64_t c, void *work);
void hp_linear_dx(float *dx, const float *dy, const float *w, int64_t n, int64_t o, int64_t c, void *work);
void hp_linear_dw(float *dw, float *db, const float *dy, const float *x, int64_t n, int64_t o, int64_t c, void *work);
void hp_embedding_fwd(float *y, const int32_t *ids, const float *w, int64_t n, int64_t v, int64_t c);
void hp_embedding_dw(float *dw, const float *dy, const int32_t *ids, int64_t n, int64_t v, int64_t c);
void hp_position_fwd(float *y, const float *x, const float *w, int64_t n, int64_t s, int64_t c, int64_t t);
void hp_position_dw(float *dw, const float *dy, int64_t n, int64_t s, int64_t c, int64_t t);
void hp_layernorm_fwd(float *y, float *mean, float *rstd, const float *x, const float *w, const float *b, int64_t n,
    int64_t c, float eps);
void hp_layernorm_dx(float *dx, const float *dy, const float *x, const float *w, const float *mean, const float *rstd,
    const float *z, int64_t n, int64_t c);
void hp_layernorm_dw(float *dw, float *db, const float *dy, const float *x, const float *mean, const float *rstd,
    int64_t n, int64_t c);
void hp_rmsnorm_fwd(float *y, float *rstd, const float *x, const float *w, int64_t n, int64_t c, float eps);
void hp_rmsnorm_dx(float *dx, const float *dy, const float *x, const float *w, const float *rstd, const float *z,
    int64_t n, int64_t c);
void hp_rmsnorm_dw(float *dw, const float *dy, const float *x, const float *rstd, int64_t n, int64_t c);
void hp_gelu_fwd(float *y, const float *x, int64_t n, int64_t c);
void hp_gelu_dx(float *dx, float *y, const float *dy, const float *x, int64_t n, int64_t c);
void hp_swiglu_fwd(float *y, const float *x, int64_t n, int64_t f);
void hp_swiglu_dx(float *dx, float *y, const float *dy, const float *x, int64_t n, int64_t f);
void hp_rope_fwd(float *qkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, float theta);
void hp_rope_dx(float *dqkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d, float theta);
void hp_attention_fwd(float *y, float *lse, const float *qkv, int64_t n, int64_t t, int64_t h, int64_t k, int64_t d,
    void *work);
void hp_attention_dx(float *dqkv, const float *dy, const float *y, const float *lse, const float *qkv, int64_t n,
    int64_t t, int64_t h, int64_t k, int64_t d, void *work);
void hp_add_fwd(float *y, const float *a, const float *b, int64_t n, int64_t c);
void hp_dropout_fwd(float *y, const float *x, const int64_t *key, int64_t n, int64_t c, int64_t salt, float p);
void hp_linearcrossentropy_fwd(double *loss, float *nll, float *dx, float *logits, float *dw, const float *x, const
    float *w, const int32_t *targets, const int64_t *key, int64_t n, int64_t v, int64_t c, int64_t r, float scale, void
    *work);
void hp_narrow(uint16_t *y, float *x, int64_t n, int64_t c);
void hp_widen(float *y, const uint16_t *x, int64_t n, int64_t c);
void hp_halve(uint16_t *y, const float *x, int64_t n);
void hp_accumulate(float *acc, const float *x, int64_t n);
void hp_sumsq(double *s, const float *x, int64_t n);
void hp_adamw_step(float *p, float *g, float *m, float *v, uint16_t *half, const double *hyper, int64_t n, float decay);
void hp_adamw_try(float *old, float *p, const float *g, const float *m, const float *v, uint16_t *half, const double
    *hyper, int64_t n, float decay);
void hp_adamw_keep(float *g, float *m, float *v, const double *hyper, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
