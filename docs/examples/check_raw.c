/* Reads raw vectors and checks a plain attention in C: forward, float64, scale and causal.
 *
 *   python -m attention_ref golden export scores/dot_product --out vectors --format raw
 *   cc -O2 check_raw.c -lm -o check_raw && ./check_raw vectors/scores/dot_product square causal
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { long n[4]; double *x; } Array; /* axes: batch, heads, tokens, width */

/* The function under test, replace it by yours: out = softmax(c q k^T) v. */
static void attention(Array q, Array k, Array v, double c, int causal, double *out) {
    long T = q.n[2], S = k.n[2], D = q.n[3], E = v.n[3];
    double *p = malloc(S * sizeof *p);
    for (long h = 0; h < q.n[0] * q.n[1]; h++)
        for (long t = 0; t < T; t++, out += E) {
            long end = causal ? t + S - T + 1 : S; /* the keys that query t may see */
            double top = -INFINITY, sum = 0;
            for (long s = 0; s < end; s++) {
                const double *a = q.x + (h * T + t) * D, *b = k.x + (h * S + s) * D;
                p[s] = 0;
                for (long d = 0; d < D; d++) p[s] += c * a[d] * b[d];
                top = fmax(top, p[s]);
            }
            for (long s = 0; s < end; s++) sum += p[s] = exp(p[s] - top);
            for (long e = 0; e < E; e++) {
                out[e] = 0; /* and zero it stays for a query without keys */
                for (long s = 0; s < end; s++) out[e] += p[s] / sum * v.x[(h * S + s) * E + e];
            }
        }
    free(p);
}

static void *read_file(const char *folder, const char *name, long *size) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) { perror(path); exit(2); }
    char *data = malloc((*size = ftell(file)) + 1);
    rewind(file);
    data[fread(data, 1, *size, file)] = 0;
    fclose(file);
    return data;
}

/* What follows "<kind> <case> <name> " in the index, or NULL. */
static const char *find(const char *index, const char *kind, const char *name, const char *what) {
    char line[512];
    snprintf(line, sizeof line, "\n%s %s %s ", kind, name, what);
    const char *at = strstr(index, line);
    return at ? at + strlen(line) : NULL;
}

static Array load(const char *folder, const char *index, const char *name, const char *what) {
    Array a = {{1, 1, 1, 1}, NULL};
    char file[512], *rest;
    const char *at = find(index, "array", name, what);
    if (!at) { fprintf(stderr, "no array %s of %s\n", what, name); exit(2); }
    long axes = strtol(at, &rest, 10), size = 8, found;
    for (long i = 4 - axes; i < 4; i++) size *= a.n[i] = strtol(rest, &rest, 10);
    if (axes > 4 || sscanf(rest, "%511s", file) != 1) exit(2);
    a.x = read_file(folder, file, &found);
    if (found != size) { fprintf(stderr, "%s has %ld bytes\n", file, found); exit(2); }
    return a;
}

int main(int count, char **args) {
    long wrong = 0, length;
    if (count < 3) { fprintf(stderr, "usage: check_raw FOLDER CASE...\n"); return 2; }
    const char *index = read_file(args[1], "index.txt", &length);
    for (int i = 2; i < count; i++) {
        Array q = load(args[1], index, args[i], "float64 in q float64");
        Array k = load(args[1], index, args[i], "float64 in k float64");
        Array v = load(args[1], index, args[i], "float64 in v float64");
        Array want = load(args[1], index, args[i], "float64 out out float64");
        const char *scale = find(index, "option", args[i], "scale");
        const char *causal = find(index, "option", args[i], "causal");
        double plain = 0, bound = 0, worst = 0;
        sscanf(find(index, "tolerance", args[i], "float64 out"), "%lf %lf", &plain, &bound);
        long size = want.n[0] * want.n[1] * want.n[2] * want.n[3], bad = 0;
        double *got = malloc(size * sizeof *got);
        attention(q, k, v, scale ? atof(scale) : 1 / sqrt((double)q.n[3]),
                  causal && *causal == 't', got);
        for (long j = 0; j < size; j++) {
            double off = fabs(got[j] - want.x[j]);
            bad += !(off <= bound); /* NaN counts as wrong */
            worst = off > worst ? off : worst;
        }
        printf("%s %s: off by %.2e, allowed %.2e, plain %.2e\n", bad ? "WRONG" : "ok", args[i],
               worst, bound, plain);
        wrong += bad;
    }
    return wrong != 0;
}
