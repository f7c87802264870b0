// What metal-cpp names of IOSurface, for building without Apple's SDK.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
