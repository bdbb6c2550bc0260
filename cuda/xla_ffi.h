// The part of XLA's foreign function interface (xla/ffi/api/c_api.h) that a handler of the CPU reads, in the layout of
// its versions 0.1 to 0.3. sru_rt/bindings/jax/frame.py declares the same structs.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace xla_ffi {

const int EXECUTE = 3;       // the stage in which a handler computes
const int METADATA = 1;      // the extension by which XLA asks for the version
const int STRING = 4;        // the type of an attribute
const int OLDEST_MINOR = 1;  // of the versions 0.x whose structs are these
const int NEWEST_MINOR = 3;
const int INVALID_ARGUMENT = 3, INTERNAL = 13;  // of its codes of errors

struct Extension {
  size_t struct_size;
  int type;
  Extension *next;
};

struct Version {
  size_t struct_size;
  Extension *extensions;
  int major, minor;
};

struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata *metadata;
};

struct Error;

struct ErrorCreate {
  size_t struct_size;
  Extension *extensions;
  const char *message;
  int code;
};

struct Api {
  size_t struct_size;
  Extension *extensions;
  Version version;
  const void *internal;
  Error *(*error_create)(ErrorCreate *);
  // more follow, which are not used here
};

struct Buffer {
  size_t struct_size;
  Extension *extensions;
  int dtype;
  void *data;
  int64_t rank;
  int64_t *dims;
};

struct Buffers {
  size_t struct_size;
  Extension *extensions;
  int64_t size;
  int *types;
  Buffer **buffers;
};

struct Text {
  const char *begin;
  size_t size;
};

struct Attributes {
  size_t struct_size;
  Extension *extensions;
  int64_t size;
  int *types;
  Text **names;
  void **values;
};

struct Frame {
  size_t struct_size;
  Extension *extensions;
  const Api *api;
  void *context;
  int stage;
  Buffers operands, results;
  Attributes attributes;
  // more follow, which are not used here
};

// Answers what XLA asks when a handler is registered; false of a frame that is none of that. `minor` is the version to
// report, or 0: then it is XLA's own, or the nearest whose structs are known. XLA up to 0.7 of jaxlib gives no API
// here.
inline bool answers_metadata(const Frame *frame, int minor) {
  for (Extension *e = frame->extensions; e; e = e->next) {
    if (e->type != METADATA) continue;
    if (!minor) minor = frame->api ? frame->api->version.minor : OLDEST_MINOR;
    minor = minor < OLDEST_MINOR ? OLDEST_MINOR : minor > NEWEST_MINOR ? NEWEST_MINOR : minor;
    Metadata *const metadata = ((MetadataExtension *)e)->metadata;
    metadata->version.major = 0;
    metadata->version.minor = minor;
    metadata->traits = 0;
    return true;
  }
  return false;
}

inline Error *error(const Frame *frame, int code, const char *message) {
  ErrorCreate made = {sizeof(ErrorCreate), nullptr, message, code};
  return frame->api->error_create(&made);
}

}  // namespace xla_ffi
