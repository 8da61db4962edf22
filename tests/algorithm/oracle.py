# SPDX-License-Identifier: Apache-2.0
"""The method as plain loops in float64, to be read beside the paper: the tests' reference.

Written from the formulas, not from the code under test: no vectorising, no log-space tricks beyond
what the formula says, Python floats throughout. `find_drop` is exact (rational) arithmetic up to
the logarithm, so ties and large offsets have one right answer.
"""

import math
from fractions import Fraction

# --- Eq. (1): margins ---


def margin_top1_top2(teacher_logp_k):
    best, second = sorted(teacher_logp_k, reverse=True)[:2]
    return best - second


def margin_top1_mean(teacher_logp_k):
    return max(teacher_logp_k) - sum(teacher_logp_k) / len(teacher_logp_k)


def renormalised(logp_k):
    total = sum(math.exp(logp) for logp in logp_k)
    return [math.exp(logp) / total for logp in logp_k]


def margin_entropy(teacher_logp_k):
    entropy = -sum(q * math.log(q) for q in renormalised(teacher_logp_k) if q > 0)
    return math.log(len(teacher_logp_k)) - entropy


def advantage_variance(teacher_logp_k, student_logp_k):
    p_k = renormalised(student_logp_k)
    advantage_k = [t - s for t, s in zip(teacher_logp_k, student_logp_k, strict=True)]
    mean = sum(p * a for p, a in zip(p_k, advantage_k, strict=True))
    return sum(p * (a - mean) ** 2 for p, a in zip(p_k, advantage_k, strict=True))


# --- Eq. (2): sentences of tokens, and their scores ---


def decoded(data):
    """The characters of `data` with the bytes of each: [(character, first byte, end)].

    A character that is not UTF-8 is U+FFFD; the bytes it stands for are those whose removal takes
    one character from the text.
    """
    text, out, at = data.decode("utf-8", "replace"), [], 0
    for i, character in enumerate(text):
        size = next(
            size
            for size in (1, 2, 3, 4)
            if data[at + size :].decode("utf-8", "replace") == text[i + 1 :]
        )
        out.append((character, at, at + size))
        at += size
    return out


def sentence_of_token(start, end, characters, text_spans):
    """Of the token of bytes start .. end: the sentence of its first character that is not white
    space, counted from the character that holds its first byte.

    White space alone: the sentence before it, which is the one that holds the white space.
    """
    own = [c for c, (_, first, stop) in enumerate(characters) if first < end and stop > start]
    solid = [c for c in own if not characters[c][0].isspace()]
    place = solid[0] if solid else own[0]
    return next(i for i, (first, stop) in enumerate(text_spans) if first <= place < stop)


def token_spans(token_bytes, text_spans):
    """Sentences as token spans; b"" is a special token and goes with the token before it."""
    characters = decoded(b"".join(token_bytes))
    sentences, at = [], 0
    for piece in token_bytes:
        if piece:
            sentences.append(sentence_of_token(at, at + len(piece), characters, text_spans))
        else:
            sentences.append(sentences[-1] if sentences else None)  # None: joins the first below
        at += len(piece)
    first = next((s for s in sentences if s is not None), 0)
    sentences = [first if s is None else s for s in sentences]
    spans = []
    for t, sentence in enumerate(sentences):
        if t and sentence == sentences[t - 1]:
            spans[-1] = (spans[-1][0], t + 1)
        else:
            spans.append((t, t + 1))
    return spans


def segment_score(margins):
    return math.log(1 + sum(margins) / len(margins))


# --- Eq. (3): the change point, by brute force ---


def as_integers(scores):
    """Scores as exact multiples of one power of two: (integers, that power)."""
    ratios = [float(s).as_integer_ratio() for s in scores]
    unit = max(denominator for _, denominator in ratios)
    return [numerator * (unit // denominator) for numerator, denominator in ratios], unit


def rss(values):
    """Residual sum of squares about the mean of integers, exact."""
    total = sum(values)
    return Fraction(len(values) * sum(x * x for x in values) - total * total, len(values))


def bic(residual, n, num_params, eps=1e-12):
    return n * math.log((float(residual) + eps) / n) + num_params * math.log(n)


def find_drop(scores, min_side=1, min_gain=0.0, tie=1e-9):
    """(index, gain, bic_none, bic_change) of the best drop, every mean compared exactly."""
    n = len(scores)
    if n < 2:
        return n, -math.inf, math.nan, math.nan
    x, unit = as_integers(scores)
    bic_none = bic(rss(x) / unit**2, n, 1)
    drops = []
    for tau in range(min_side, n - min_side + 1):
        before, after = x[:tau], x[tau:]
        if sum(before) * len(after) > sum(after) * len(before):  # mean before > mean after
            drops.append((tau, bic((rss(before) + rss(after)) / unit**2, n, 3)))
    if not drops:
        return n, -math.inf, bic_none, math.inf
    lowest = min(value for _, value in drops)
    tau, value = next((tau, value) for tau, value in drops if value <= lowest + tie)
    gain = bic_none - value
    return (tau if gain > min_gain else n), gain, bic_none, value


# --- Eq. (4) and (5): loss, rescaling, reduction ---


def row_loss(token_loss_t, valid_t, q_t, rescale):
    """Mean of q * loss over valid tokens, rescaled by sum(l) / sum(l q); None = none supervised."""
    num_valid = sum(1 for l in valid_t if l)
    mass = sum(q for l, q in zip(valid_t, q_t, strict=True) if l)
    if mass == 0:
        return None
    factor = num_valid / mass if rescale else 1.0
    total = 0.0
    for loss, l, q in zip(token_loss_t, valid_t, q_t, strict=True):
        if l:
            total += factor * q * loss
    return total / num_valid


def batch_loss(token_loss_bt, valid_bt, q_bt, rescale=True):
    rows = [row_loss(*row, rescale) for row in zip(token_loss_bt, valid_bt, q_bt, strict=True)]
    rows = [row for row in rows if row is not None]
    return sum(rows) / len(rows)


def iw_weights(advantage_t, gamma):
    total = sum(abs(a) for a in advantage_t)
    return [
        1 + gamma * (1 - sum(abs(a) for a in advantage_t[:t]) / total)
        for t in range(len(advantage_t))
    ]


# --- token losses and their gradients in the student's logits ---


def softmax(z_v):
    top = max(z_v)
    e_v = [math.exp(z - top) for z in z_v]
    return [e / sum(e_v) for e in e_v]


def log_softmax(z_v):
    top = max(z_v)
    lse = top + math.log(sum(math.exp(z - top) for z in z_v))
    return [z - lse for z in z_v]


def sampled_advantage(
    logp, teacher_logp, reference_logp=0.0, extrapolation=1.0, floor=0.0, clip=0.0
):
    advantage = -((logp - reference_logp) - extrapolation * (teacher_logp - reference_logp))
    if floor:
        advantage = max(advantage, floor)
    if clip:
        advantage = min(max(advantage, -clip), clip)
    return advantage


def sampled_pg(z_v, token, advantage, ratio=1.0):
    """Value -A' log p(y) and gradient -A' (onehot - p): A' is a constant."""
    p_v = softmax(z_v)
    scale = advantage * ratio
    loss = -scale * log_softmax(z_v)[token]
    return loss, [-scale * ((v == token) - p) for v, p in enumerate(p_v)]


def kl(p_v, q_v):
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(p_v, q_v, strict=True) if p > 0)


def jsd(p_v, q_v, beta):
    """GKD: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; p student."""
    m_v = [beta * q + (1 - beta) * p for p, q in zip(p_v, q_v, strict=True)]
    return beta * kl(q_v, m_v) + (1 - beta) * kl(p_v, m_v)


def divergence(kind, p_k, q_k, beta):
    """Of two lists of positive numbers; they need not sum to one (tail "truncate")."""
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return kl(q_k, p_k)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return kl(p_k, q_k)
    return jsd(p_k, q_k, beta)


def on_support(p_v, q_v, ids, tail):
    p_k, q_k = [p_v[i] for i in ids], [q_v[i] for i in ids]
    if tail == "renormalise":
        return [p / sum(p_k) for p in p_k], [q / sum(q_k) for q in q_k]
    if tail == "bin":
        rest = [v for v in range(len(p_v)) if v not in ids]
        if rest:
            return [*p_k, sum(p_v[v] for v in rest)], [*q_k, sum(q_v[v] for v in rest)]
    return p_k, q_k


def support_loss(kind, z_v, teacher_z_v, ids, tail, beta):
    p_k, q_k = on_support(softmax(z_v), softmax(teacher_z_v), ids, tail)
    return divergence(kind, p_k, q_k, beta)


def numerical_gradient(f, z_v, step=1e-5):
    """Central differences: independent of anybody's derivation."""
    out = []
    for v in range(len(z_v)):
        up, down = list(z_v), list(z_v)
        up[v] += step
        down[v] -= step
        out.append((f(up) - f(down)) / (2 * step))
    return out


def fixed_advantage_gradient(z_v, teacher_z_v, ids, tail):
    """Top-K reverse KL in the stop-gradient form: sum_k w_k (log p - log q) grad log p_k.

    w = p (renormalised on the support for that tail); the logs are never renormalised. With the
    tail bin, the bin is one more outcome whose log-prob has a gradient of its own.
    """
    p_v, q_v = softmax(z_v), softmax(teacher_z_v)
    groups = [[i] for i in ids]
    rest = [v for v in range(len(z_v)) if v not in ids]
    if tail == "bin" and rest:
        groups.append(rest)
    mass = [sum(p_v[v] for v in group) for group in groups]
    teacher = [sum(q_v[v] for v in group) for group in groups]
    weight = [m / sum(mass) for m in mass] if tail == "renormalise" else mass
    out = [0.0] * len(z_v)
    for group, p, q, w in zip(groups, mass, teacher, weight, strict=True):
        r = w * (math.log(p) - math.log(q))
        for v in range(len(z_v)):  # d log(sum of group) / dz_v = [v in group] p_v / p - p_v
            out[v] += r * ((p_v[v] / p if v in group else 0.0) - p_v[v])
    return out
