// What metal-cpp names of CoreFoundation, for building without Apple's SDK.
#pragma once

typedef const void* CFTypeRef;
typedef double CFTimeInterval;  // seconds
