#include "common/isa/neon.h"

#include "training/saved.inl.h"
