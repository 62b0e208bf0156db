#!/usr/bin/env bash
# The effect of each option beyond the paper on JEM++ (M = 5), one at a time: accuracy, calibration,
# the last energy gap. All rows together cost as much as Tables 2 and 5. SEEDS="1 2 3" gives the spread
# over seeds, against which to judge a difference.
source "$(dirname "$0")/common.sh"

CAL=(--eval accuracy calibration)
M5=(--n_steps 5)
row options "baseline" options-base "${M5[@]}" -- "${CAL[@]}"
row options "clean_p_x" options-clean "${M5[@]}" --clean_p_x -- "${CAL[@]}"
row options "recalibrate_bn 1000" options-recalibrate "${M5[@]}" --recalibrate_bn 1000 -- "${CAL[@]}"
row options "ema 0.99" options-ema "${M5[@]}" --ema 0.99 -- "${CAL[@]}"
row options "labelled batch x 2" options-labelled "${M5[@]}" --labelled_batch "$LABELLED" -- "${CAL[@]}"
row options "sam 0.05" options-sam "${M5[@]}" --sam 0.05 -- "${CAL[@]}"
row options "schedule linear" options-linear "${M5[@]}" --schedule linear -- "${CAL[@]}"
row options "bn_momentum 0.1" options-momentum "${M5[@]}" --bn_momentum 0.1 -- "${CAL[@]}"
row options "p_x_weight 0.3" options-px03 "${M5[@]}" --p_x_weight 0.3 -- "${CAL[@]}"
row options "p_x_weight 0.1" options-px01 "${M5[@]}" --p_x_weight 0.1 -- "${CAL[@]}"
row options "nesterov" options-nesterov "${M5[@]}" --nesterov -- "${CAL[@]}"
row options "step_decay 0.8" options-decay "${M5[@]}" --step_decay 0.8 -- "${CAL[@]}"
row options "label_smoothing 0.1" options-smoothing "${M5[@]}" --label_smoothing 0.1 -- "${CAL[@]}"
row options "schedule cosine" options-cosine "${M5[@]}" --schedule cosine -- "${CAL[@]}"
row options "alternating_flip" options-flip "${M5[@]}" --alternating_flip -- "${CAL[@]}"
row options "sgld_std 0.01" options-noise "${M5[@]}" --sgld_std 0.01 -- "${CAL[@]}"
