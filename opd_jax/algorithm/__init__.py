# SPDX-License-Identifier: Apache-2.0
"""The paper as code, its controls and its baselines. Arrays in, arrays out; imports no other room.

"Prefix Teach, Suffix Fade", arXiv 2605.13643. Only its abstract was at hand when this was written;
the formulas come from a structured note on version 1. docs/method.md has each equation with its
source and with what the paper leaves open; tests/algorithm/oracle.py has them as plain loops;
examples/release_rule.py prints one rollout through all of them.

  eq.  paper                                      name                where
  (1)  C_t, the student's top K                   candidates_btk      the sampler
       M_t = log p_T(a1) - log p_T(a2), a in C_t  margin_bt           margin.teacher_margin
  (2)  B_i, sentence i                            spans               segments.segment
       S_i = log(1 + mean of M_t over B_i)        score_s             segments.segment_scores
  (3)  BIC_0 = n log((RSS_0+eps)/n) + log n       bic_none            change_point.find_drop
       BIC_1 = n log((RSS_1+eps)/n) + 3 log n     bic_change          change_point.find_drop
       tau*, accepted iff BIC_1 < BIC_0           index, gain         change_point.find_drop
       q_t, the release mask                      supervised_bt       release.Release
  (4)  A_t = log p_T(y_t) - log p_S(y_t)          advantage           objective.token_loss
       L_t = -A_t log p_S(y_t), A_t constant      sampled_pg          objective.token_loss
  (5)  A'_t = A_t q_t (sum l)/(sum l q)           weight_bt           weights.loss_weights
  (6)  Var_{a ~ p_S}(A_t(a)) on C_t               advantage_variance  margin.advantage_variance

The one we chose in (5): l_t = 1 on every valid response token. Other modules: `baselines` (controls
without a change point, other methods' token selections), `divergences` (KLs and JSD on any
support), `head` (any of these losses through the vocabulary head, in chunks), `profiles` (where
along a response the teacher's feedback stops discriminating).
"""
