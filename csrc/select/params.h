// the columns of each utterance's settings; meaning and the same order: spear_fast/ops/selection_params.py
#pragma once

namespace spear_fast {

enum FloatParam { kTemperature, kGuidance, kLengthPenalty, kRepetitionPenalty, kPatience, kTopP, kFloatParams };

enum IntParam {
  kMethod,
  kBeamSize,
  kMaxLength,
  kMinLength,
  kEosId,
  kNoRepeatNgramSize,
  kEarlyStopping,
  kPrefixLength,
  kTopK,
  kIntParams
};

enum SelectionMethod { kBeam, kSample, kReference, kSpeculative };

enum EarlyStopping { kAtBound, kAtOnce, kNever };

inline constexpr double kColdest = 1e-10;

}  // namespace spear_fast
