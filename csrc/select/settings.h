// the columns of each utterance's settings; meaning and the same order: spear_fast/ops/selection_settings.py
#pragma once

namespace spear_fast {

enum RealSetting { kTemperature, kGuidance, kLengthPenalty, kRepetitionPenalty, kPatience, kTopP, kReals };

enum WholeSetting {
  kMethod,
  kBeamSize,
  kMaxLength,
  kMinLength,
  kEosId,
  kNoRepeatNgramSize,
  kEarlyStopping,
  kPrefixLength,
  kTopK,
  kWholes
};

enum Method { kBeam, kSample };

enum EarlyStopping { kAtBound, kAtOnce, kNever };

inline constexpr double kColdest = 1e-10;

}  // namespace spear_fast
