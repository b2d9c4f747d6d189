#include "common/isa/baseline.h"

#include "training/saved.inl.h"
