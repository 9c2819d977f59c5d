// kv_compact: the kept cache slots of every sequence move together, in all layers' keys and values, in place.
//
// Bytes moved: each slot that changes place is read once and written once. A dropped slot that a kept one replaces is
// fetched as well, since caches take lines whole; nothing else is touched.
#pragma once

#include "ugsd/args.h"

namespace ugsd {

void kv_compact(const KvCompactArgs& args);

}  // namespace ugsd
